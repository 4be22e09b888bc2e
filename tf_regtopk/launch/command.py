r"""Starts a script as several workers of one training, and sees them through.

    python -m tf_regtopk.run --workers=4 train.py --epochs=10

The script needs nothing but `tf_regtopk.MultiWorkerMirroredStrategy()`, and
`tf_regtopk.Backup` to go on where it was when a worker was lost. Each worker
gets a port, `TF_CONFIG`, and its share of the GPUs, or else of the cores. When
one fails, all are ended, and the cause is told; with `--max_restarts` all of
them are started again.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import signal
import sys
import tempfile
from types import FrameType

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import notes
from tf_regtopk.launch import shares
from tf_regtopk.launch import supervision
from tf_regtopk.launch import worker as worker_lib

# Times that a port may be taken by others between the choice and its use.
_MAX_PORT_TRIES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments, those of the process if None.

    Returns:
        The exit status: 0 when all workers have succeeded, 1 when a script has
        failed, 3 when a worker was lost, 4 when ports were taken, and 128 + n
        when signal n has ended the launcher.
    """
    args = _parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    directory = pathlib.Path(
        args.log_dir or tempfile.mkdtemp(prefix="tf_regtopk-")
    ).resolve()  # A script may change its folder.
    num_restarts, num_port_tries = 0, 1
    while True:
        attempt = num_restarts + num_port_tries - 1
        of_attempt = directory / f"attempt-{attempt}"
        of_attempt.mkdir(parents=True)
        status = _attempt(args, of_attempt)
        if status == 0:
            return 0
        if status == bootstrap.PORT_TAKEN and num_port_tries < _MAX_PORT_TRIES:
            num_port_tries += 1
            _say("A port was taken meanwhile. Trying others.")
            continue
        if num_restarts == args.max_restarts:
            return status
        num_restarts += 1
        _say(
            f"Restart {num_restarts} of {args.max_restarts}: all workers start "
            f"again, {_where_it_goes_on(of_attempt)}."
        )


def _attempt(args: argparse.Namespace, directory: pathlib.Path) -> int:
    """Starts all workers once, and returns the status when they have ended."""
    workers: list[worker_lib.Worker] = []
    try:
        for place in places(args.workers, args.device, args.cores):
            workers.append(
                worker_lib.Worker(
                    place,
                    [args.script, *args.arguments],
                    directory,
                    _shower(args.show, place.number),
                )
            )
        pids = ", ".join(str(worker.pid) for worker in workers)
        _say(
            f"Started {_count(len(workers), 'worker')} (processes {pids}), "
            f"with their output in {directory}"
        )
        failures = supervision.wait_for(workers, directory, args.start_timeout)
    finally:
        for worker in workers:
            worker.end()
    if not failures:
        return 0
    _report(failures, workers)
    if any(failure.is_port_taken for failure in failures):
        return bootstrap.PORT_TAKEN
    if any(failure.is_own and not failure.is_lost for failure in failures):
        return bootstrap.FAILED
    return bootstrap.LOST_A_WORKER


def places(
    count: int, device: str, cores_of: str = "share"
) -> list[worker_lib.Place]:
    """Shares this machine out among workers.

    Args:
        count: Number of workers.
        device: "auto", "gpu" or "cpu". "auto" is "gpu" where there is one.
        cores_of: "share" or "all", which matters on the CPU.

    Returns:
        A `Place` for each. Each has its GPUs and all cores, or, on the CPU, its
        share of the cores, because the threads of several workers on the same
        cores get in each other's way (`benchmarks/cluster/launcher_cores.py`).

    Raises:
        SystemExit: If there are GPUs, but not for every worker.
    """
    gpus = shares.gpus() if device != "cpu" else []
    if (gpus or device == "gpu") and len(gpus) < count:
        raise SystemExit(
            "`--workers` must be at most the number of GPUs, or `--device=cpu` "
            f"be given. Received: {count} workers, {_count(len(gpus), 'GPU')}"
        )
    cores = shares.cores()
    if gpus or cores_of == "all" or len(cores) < count:
        cores = []
    return [
        worker_lib.Place(number, tuple(addresses), tuple(own), tuple(pinned))
        for number, (addresses, own, pinned) in enumerate(
            zip(
                [shares.free_addresses(count)] * count,
                shares.split(gpus, count),
                shares.split(cores, count),
                strict=True,
            )
        )
    ]


def _report(
    failures: Sequence[worker_lib.Failure],
    workers: Sequence[worker_lib.Worker],
) -> None:
    """Says on one screen which workers have failed, and why."""
    lines = ["-" * 72]
    for failure in failures:
        worker = workers[failure.number]
        lines += [
            f"{worker.name} {failure.what}, after {worker.seconds:.0f} s.",
            f"  Its output: {worker.log}",
            *(f"  | {line}" for line in worker.last_lines(5)),
        ]
    num_others = len(workers) - len(failures)
    if num_others:
        lines.append(f"{_count(num_others, 'other worker')} ended with it.")
    _say("\n".join([*lines, "-" * 72]))


def _where_it_goes_on(directory: pathlib.Path) -> str:
    """Says from where a script goes on when it is started again."""
    backups = notes.read(directory, "backup")
    if not backups:
        return (
            "from the beginning, because the script has not called "
            "`tf_regtopk.Backup.restore`"
        )
    return f"from the last backup that all have in {', '.join(backups)}"


def _shower(show: str, number: int) -> Callable[[bytes], None]:
    """Returns the function that writes a worker's output to the terminal."""
    if show == "none" or (show == "chief" and number > 0):
        return lambda piece: None
    if show == "chief":
        return _write
    rest = b""

    def show_lines(piece: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            _write(f"[worker {number}] ".encode() + line + b"\n")

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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # Not absl, which would look for its flags among those of the script.
    parser = argparse.ArgumentParser(
        "python -m tf_regtopk.run",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        required=True,
        help="Number of workers to start on this machine.",
    )
    parser.add_argument(
        "--max_restarts",
        type=_natural_or_zero,
        default=0,
        help="How often all workers are started again when one has failed.",
    )
    parser.add_argument(
        "--start_timeout",
        type=_natural,
        default=300,
        help="Seconds that a worker waits for the others to start.",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "gpu", "cpu"],
        default="auto",
        help="auto: GPUs, shared out, where there are any.",
    )
    parser.add_argument(
        "--cores",
        choices=["share", "all"],
        default="share",
        help="On the CPU: the cores of each worker, if there are enough.",
    )
    parser.add_argument(
        "--show",
        choices=["chief", "all", "none"],
        default="chief",
        help="Whose output is shown here: that of worker 0, or of all, with "
        "the number of the worker before each line.",
    )
    parser.add_argument(
        "--log_dir",
        help="Folder for the output of each worker, by default a new one among "
        "the temporary files.",
    )
    parser.add_argument("script", help="Path of the script.")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="Those of the script."
    )
    args = parser.parse_args(argv)
    if not pathlib.Path(args.script).is_file():
        parser.error(f"`script` must be a file. Received: {args.script}")
    if args.log_dir and list(pathlib.Path(args.log_dir).glob("attempt-*")):
        parser.error(
            "`--log_dir` must hold no output of an earlier run. "
            f"Received: {args.log_dir}"
        )
    return args


def _natural(text: str) -> int:
    return _at_least(text, 1)


def _natural_or_zero(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least {minimum}. Received: {text}"
        )
    return int(text)
