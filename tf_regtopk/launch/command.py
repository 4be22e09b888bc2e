r"""Starts a script as several workers of one training, and sees them through.

    python -m tf_regtopk.run --workers=4 train.py --epochs=10

The script needs nothing but `tf_regtopk.MultiWorkerMirroredStrategy()`, and
`tf_regtopk.Backup` to go on where it was when a worker was lost. Each worker
gets a port, `TF_CONFIG`, and its share of the GPUs, or else of the cores. When
one fails, all are ended, and the cause is told; with `--max_restarts` all of
them are started again.

On several machines the same command runs on each, with `--hosts` and a secret
that the launchers know. Where Slurm or `TF_CONFIG` says which worker this is,
the launcher starts this one.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
import signal
import sys
import tempfile
import time
from types import FrameType

from tf_regtopk.launch import arguments
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import cluster
from tf_regtopk.launch import groups
from tf_regtopk.launch import notes
from tf_regtopk.launch import supervision
from tf_regtopk.launch import worker as worker_lib

# Times that a port may be taken by others between the choice and its use.
_MAX_PORT_TRIES = 3
# The exit status of `argparse`.
WRONG_ARGUMENTS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments, those of the process if None.

    Returns:
        The exit status: 0 when all workers have succeeded, 1 when a script has
        failed, 2 when the arguments are wrong, 3 when a worker was lost, 4 when
        ports were taken, and 128 + n when signal n has ended the launcher.

    Raises:
        SystemExit: If the arguments are wrong, or a signal ends the launcher.
    """
    args = arguments.parse(argv, (__doc__ or "").partition("\n")[0])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # As under `nohup`.
            signal.signal(number, _exit)
    try:
        group, told = groups.group_of(args)
        directory = _log_directory(args.log_dir, group.folder)
        if told:
            _say(told)
        return _supervise(args, group, directory)
    except TimeoutError as error:
        _say(str(error))
        return bootstrap.LOST_A_WORKER
    except (OSError, ValueError) as error:
        _say(f"python -m tf_regtopk.run: {error}")
        return WRONG_ARGUMENTS


def _supervise(
    args: argparse.Namespace, group: groups.Group, directory: pathlib.Path
) -> int:
    """Starts the workers until they succeed, or as often as they may fail."""
    num_port_tries = 1
    # A launcher of several may have been started again.
    num_before = len(list(directory.glob("attempt-*")))
    try:
        for attempt in itertools.count(num_before):
            of_attempt = directory / f"attempt-{attempt}"
            of_attempt.mkdir(parents=True)
            status = _attempt(args, group, of_attempt)
            if status == 0:
                return 0
            if (
                status == bootstrap.PORT_TAKEN
                and group.chooses_ports
                and num_port_tries < _MAX_PORT_TRIES
            ):
                num_port_tries += 1
                _say("A port was taken meanwhile. Trying others.")
                continue
            if group.num_restarts >= args.max_restarts:
                return status
            group.num_restarts += 1
            _say(
                f"Restart {group.num_restarts} of {args.max_restarts}: all "
                f"workers start again, {_where_it_goes_on(of_attempt)}."
            )
            time.sleep(group.pause)
    finally:
        group.leave()
    raise AssertionError("An attempt follows another without end.")


def _attempt(
    args: argparse.Namespace, group: groups.Group, directory: pathlib.Path
) -> int:
    """Starts all workers once, and returns the status when they have ended."""
    workers: list[worker_lib.Worker] = []
    try:
        for place in group.places():
            workers.append(
                worker_lib.Worker(
                    place,
                    [args.script, *args.arguments],
                    directory,
                    _shower(args.show, place),
                )
            )
        pids = ", ".join(str(worker.pid) for worker in workers)
        _say(
            f"Started {_count(len(workers), 'worker')} (processes {pids}), "
            f"with their output in {directory}"
        )
        failures = supervision.wait_for(
            workers, directory, args.start_timeout, group.failures_elsewhere
        )
    finally:
        for worker in workers:
            worker.end()
    own = [_detailed(failure, workers, group) for failure in failures]
    # Several machines may tell of the same failure, one with its details.
    told = sorted(group.settle(own), key=lambda failure: bool(failure.details))
    failures = list({failure.name: failure for failure in told}.values())
    if not failures and all(worker.has_succeeded for worker in workers):
        return 0
    causes = [f for f in failures if not f.is_lost] or failures
    _say("\n".join(_report(causes, workers)))
    if any(failure.is_port_taken for failure in causes):
        return bootstrap.PORT_TAKEN
    if any(failure.is_own and not failure.is_lost for failure in causes):
        return bootstrap.FAILED
    return bootstrap.LOST_A_WORKER


def _detailed(
    failure: worker_lib.Failure,
    workers: Sequence[worker_lib.Worker],
    group: groups.Group,
) -> worker_lib.Failure:
    """Adds what the worker has said last, and who does not answer it."""
    named = [each for each in workers if each.name == failure.name]
    if not named:  # It is of another machine.
        return failure
    [worker] = named
    details = [
        f"Its output: {worker.log}",
        *(f"| {line}" for line in worker.last_lines(5)),
    ]
    if failure.is_lost:
        details += group.silence()
    what = f"{failure.what}, after {worker.seconds:.0f} s"
    return dataclasses.replace(failure, what=what, details=tuple(details))


def _report(
    causes: Sequence[worker_lib.Failure], workers: Sequence[worker_lib.Worker]
) -> list[str]:
    """Returns the lines of a screen that says which have failed, and why."""
    lines = ["-" * 72]
    for failure in causes:
        lines.append(f"{failure.name} {failure.what}.")
        lines += [f"  {detail}" for detail in failure.details]
    names = {failure.name for failure in causes}
    num_others = sum(worker.name not in names for worker in workers)
    if num_others:
        here = _count(num_others, "other worker")
        lines.append(f"{here} ended with it.")
    return [*lines, "-" * 72]


def _where_it_goes_on(directory: pathlib.Path) -> str:
    """Says from where a script goes on when it is started again."""
    backups = notes.read(directory, "backup")
    if not backups:
        return (
            "from the beginning, because the script has not called "
            "`tf_regtopk.Backup.restore`"
        )
    return f"from the last backup that all have in {', '.join(backups)}"


def _log_directory(log_dir: str | None, folder: str) -> pathlib.Path:
    """Returns the folder for the output of this machine's workers."""
    parent = log_dir or tempfile.mkdtemp(prefix="tf_regtopk-")
    # A script may change its working directory.
    directory = (pathlib.Path(parent) / folder).resolve()
    if not folder and list(directory.glob("attempt-*")):
        raise ValueError(
            "`--log_dir` must hold no output of an earlier run. "
            f"Received: {directory}"
        )
    return directory


def _shower(show: str, place: cluster.Place) -> Callable[[bytes], None]:
    """Returns the function that writes a worker's output to the terminal."""
    if show == "none" or (show == "chief" and place.number > 0):
        return lambda piece: None
    if show == "chief":
        return _write
    rest = b""

    def show_lines(piece: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            _write(f"[{place.name}] ".encode() + line + b"\n")

    return show_lines


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _say(text: str) -> None:
    """Tells something of the launcher itself."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _exit(number: int, frame: FrameType | None) -> None:
    """Ends the launcher by way of its clean-up."""
    del frame
    sys.exit(128 + number)
