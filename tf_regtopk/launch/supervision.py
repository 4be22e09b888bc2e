"""Supervision: waiting for workers, and finding the cause of a failure."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import time

from tf_regtopk.launch import notes
from tf_regtopk.launch import terminal
from tf_regtopk.launch import worker as worker_lib

# The other workers fail a moment after the one that has caused it, and are
# given so many seconds to do so.
_SETTLE_SECONDS = 3.0
# Seconds in which TensorFlow notices that a worker of another machine is lost.
_NOTICE_SECONDS = 15.0
# Seconds in which all workers end once one has backed up and ended as asked:
# they have waited for each other's backups.
_END_SECONDS = 60.0
_POLL_SECONDS = 0.1


def wait_for(
    workers: Sequence[worker_lib.Worker],
    directory: pathlib.Path,
    start_timeout: float,
    failures_elsewhere: Callable[[], Sequence[worker_lib.Failure]] = list,
    reason_to_end: Callable[[], str] = str,
    meanwhile: Callable[[], object] = bool,
) -> list[worker_lib.Failure]:
    """Waits until all workers have succeeded or the cause of a failure is seen.

    A worker that has lost another is not the cause. If no other has failed in
    some seconds, those are that still run, because they are stuck. Workers that
    can back up are asked to do so and to end where there is a reason.

    Args:
        workers: Sequence of `Worker`.
        directory: Folder of their notes.
        start_timeout: Seconds in which all workers of all machines must create
            their strategy once one has begun to: TensorFlow waits for them
            without end.
        failures_elsewhere: Function that returns the failures of other
            machines so far.
        reason_to_end: Function that says why the workers are to back up and
            end, or nothing.
        meanwhile: Function that is called again and again.

    Returns:
        The failures that are the cause, here or elsewhere; empty if all have
        succeeded.
    """
    first_lost = first_arrived = None
    reason = ""
    while True:
        meanwhile()
        # Without a backup the end of the workers would lose what they did.
        can_back_up = notes.count(directory, "can_back_up") == len(workers)
        if not reason and can_back_up:
            reason = reason_to_end()
            if reason:
                terminal.say(f"{reason}. The workers back up, and end.")
                for worker in workers:
                    worker.ask_to_end()
        arrived = notes.read(directory, "arrived")
        if arrived and not notes.read(directory, "met"):
            first_arrived = first_arrived or time.monotonic()
            if time.monotonic() - first_arrived > start_timeout:
                return _late(arrived, workers, start_timeout)
        found = [f for worker in workers if (f := worker.failure())]
        if causes := _causes(found):
            return causes
        if all(worker.has_succeeded for worker in workers):
            return []
        elsewhere = failures_elsewhere()
        if causes := _causes(elsewhere):
            return causes
        if found or elsewhere:
            first_lost = first_lost or time.monotonic()
            # Workers elsewhere may notice a loss long before those here.
            seconds = _SETTLE_SECONDS if found else _NOTICE_SECONDS
            if any(failure.is_asked for failure in (*found, *elsewhere)):
                seconds = _END_SECONDS
            if (
                len(found) == len(workers)
                or time.monotonic() - first_lost > seconds
            ):
                return _causes_among(found, workers)
        time.sleep(_POLL_SECONDS)


def _causes(
    failures: Sequence[worker_lib.Failure],
) -> list[worker_lib.Failure]:
    """Returns the failures that come from no other, and that nobody wanted."""
    return [f for f in failures if not (f.is_lost or f.is_asked)]


def _late(
    arrived: Sequence[str],
    workers: Sequence[worker_lib.Worker],
    start_timeout: float,
) -> list[worker_lib.Failure]:
    """Returns as causes the workers that are not among those that arrived."""
    if len(arrived) == len(workers):  # Some of another machine are not.
        return [
            worker_lib.Failure(
                worker.name,
                f"has waited {start_timeout:g} s (`--start_timeout`) for the "
                "others to create their strategies",
                is_lost=True,
            )
            for worker in workers
        ]
    return [
        worker_lib.Failure(
            worker.name,
            "has not created its strategy within "
            f"{start_timeout:g} s (`--start_timeout`) of another worker",
        )
        for worker in workers
        if str(worker.number) not in arrived
    ]


def _causes_among(
    lost: Sequence[worker_lib.Failure], workers: Sequence[worker_lib.Worker]
) -> list[worker_lib.Failure]:
    """Returns the causes where all workers lost others, or ended as asked."""
    names = {failure.name for failure in lost}
    others = [worker for worker in workers if worker.name not in names]
    causes = [
        worker_lib.Failure(
            worker.name,
            "had ended before the others"
            if worker.has_succeeded
            else "did not answer the others, and is stuck",
        )
        for worker in others
    ]
    return causes or list(lost)
