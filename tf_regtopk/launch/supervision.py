"""Supervision: waiting for workers, and finding the cause of a failure."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import time

from tf_regtopk.launch import notes
from tf_regtopk.launch import worker as worker_lib

# The other workers fail a moment after the one that has caused it, and are
# given so many seconds to do so.
_SETTLE_SECONDS = 3.0
# Seconds in which TensorFlow notices that a worker of another machine is lost.
_NOTICE_SECONDS = 15.0
_POLL_SECONDS = 0.1


def wait_for(
    workers: Sequence[worker_lib.Worker],
    directory: pathlib.Path,
    start_timeout: float,
    failures_elsewhere: Callable[[], Sequence[worker_lib.Failure]] = list,
) -> list[worker_lib.Failure]:
    """Waits until all workers have succeeded or the cause of a failure is seen.

    A worker that has lost another is not the cause. If no other has failed in
    some seconds, those are that still run, because they are stuck.

    Args:
        workers: Sequence of `Worker`.
        directory: Folder of their notes.
        start_timeout: Seconds in which all workers of all machines must create
            their strategy once one has begun to: TensorFlow waits for them
            without end.
        failures_elsewhere: Function that returns the failures of other
            machines so far.

    Returns:
        The failures that are the cause, here or elsewhere; empty if all have
        succeeded.
    """
    first_lost = first_arrived = None
    while True:
        arrived = notes.read(directory, "arrived")
        if arrived and not notes.read(directory, "met"):
            first_arrived = first_arrived or time.monotonic()
            if time.monotonic() - first_arrived > start_timeout:
                return _late(arrived, workers, start_timeout)
        found = [f for worker in workers if (f := worker.failure())]
        causes = [failure for failure in found if not failure.is_lost]
        if causes:
            return causes
        if all(worker.has_succeeded for worker in workers):
            return []
        elsewhere = failures_elsewhere()
        causes = [failure for failure in elsewhere if not failure.is_lost]
        if causes:
            return causes
        if found or elsewhere:
            first_lost = first_lost or time.monotonic()
            # Workers elsewhere may notice a loss long before those here.
            seconds = _SETTLE_SECONDS if found else _NOTICE_SECONDS
            if (
                len(found) == len(workers)
                or time.monotonic() - first_lost > seconds
            ):
                return _causes_among(found, workers)
        time.sleep(_POLL_SECONDS)


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
    """Returns the causes where all failures are of workers that lost others."""
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
