"""Arguments of the launcher's command."""

import argparse
from collections.abc import Sequence
import pathlib


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Parses the command line, and ends the process where it is wrong.

    Args:
        argv: The arguments, those of the process if None.
        description: Line that says what the command does.
    """
    # Not absl, which would look for its flags among those of the script.
    parser = argparse.ArgumentParser(
        "python -m tf_regtopk.run", description=description, allow_abbrev=False
    )
    parser.add_argument(
        "--workers",
        type=_least_and_most,
        help="Number of workers to start on this machine. 2:8 for at least 2 "
        "and at most 8: without those that were lost training goes on, and "
        "SIGUSR1 brings them back. Without it, and without the arguments for "
        "several machines, TF_CONFIG or Slurm tells the one worker that this "
        "is.",
    )
    machines = parser.add_argument_group("several machines")
    machines.add_argument(
        "--hosts",
        help="Names of all machines, with a number of workers where there are "
        "several: host0,host1:2. The same on each.",
    )
    machines.add_argument(
        "--hostfile", help="File with these names, in place of --hosts."
    )
    machines.add_argument(
        "--host",
        help="Name by which the others reach this machine; by default found.",
    )
    machines.add_argument(
        "--rendezvous_port",
        type=_port,
        default=29500,
        help="Port at which the first of the hosts waits for the others.",
    )
    machines.add_argument(
        "--rendezvous",
        help="Host and port at which machines meet that are not listed: "
        "host0:29500, with --nodes.",
    )
    machines.add_argument(
        "--nodes",
        type=_least_and_most,
        help="Number of machines that meet there. 2:4 for at least 2 and at "
        "most 4, which may come and go.",
    )
    machines.add_argument(
        "--secret_file",
        help="File with a secret that all machines know, in place of the "
        "environment variable TF_REGTOPK_SECRET. The launchers ask each other "
        "for it. TensorFlow's own ports know no password: let only the "
        "machines reach them.",
    )
    machines.add_argument(
        "--port",
        type=_port,
        help="Port of this machine's first worker. The next has the next. By "
        "default free ones.",
    )
    parser.add_argument(
        "--max_restarts",
        type=_natural_or_zero,
        default=0,
        help="How often all workers are started again when one has failed.",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="Keeps one more process for each worker, which has imported "
        "TensorFlow and becomes the worker at the next restart. Takes about "
        "300 MB of memory a worker, from the first backup on; so it needs "
        "--max_restarts, and Backup in the script.",
    )
    parser.add_argument(
        "--start_timeout",
        type=_natural,
        default=300,
        help="Seconds that a worker waits for the others to start.",
    )
    parser.add_argument(
        "--grace_seconds",
        type=_natural,
        default=25,
        help="Seconds that the workers have to back up when SIGTERM ends the "
        "launcher.",
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
    parser.add_argument(
        "-m",
        dest="is_module",
        action="store_true",
        help="The script is the name of a module, as for python -m.",
    )
    parser.add_argument("script", help="Path of the script.")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="Those of the script."
    )
    args = parser.parse_args(argv)
    if not args.is_module and not pathlib.Path(args.script).is_file():
        parser.error(f"`script` must be a file. Received: {args.script}")
    if args.standby:
        _check_standby(parser, args)
    return args


def _check_standby(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> None:
    """Ends the program if no standby could ever become a worker."""
    if not args.max_restarts:
        parser.error(
            "`--standby` must go with `--max_restarts`, for which it waits. "
            "Received: --max_restarts=0"
        )
    if args.workers and args.workers[0] < args.workers[1]:
        least, most = args.workers
        parser.error(
            "`--standby` must go with a fixed number of `--workers`, because "
            "other workers get other cores, which libraries count when they "
            f"are imported. Received: --workers={least}:{most}"
        )


def _least_and_most(text: str) -> tuple[int, int]:
    least, separator, most = text.partition(":")
    bounds = _natural(least), _natural(most if separator else least)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(
            f"must be a number, or the least and the most. Received: {text}"
        )
    return bounds


def _natural(text: str) -> int:
    return _at_least(text, 1)


def _natural_or_zero(text: str) -> int:
    return _at_least(text, 0)


def _port(text: str) -> int:
    if _at_least(text, 1) > 65535:
        raise argparse.ArgumentTypeError(
            f"must be a port, at most 65535. Received: {text}"
        )
    return int(text)


def _at_least(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least {minimum}. Received: {text}"
        )
    return int(text)
