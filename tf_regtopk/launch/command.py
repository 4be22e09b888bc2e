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
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import pathlib
import signal
import tempfile
import time

from tf_regtopk.launch import arguments
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import groups
from tf_regtopk.launch import notes
from tf_regtopk.launch import rendezvous
from tf_regtopk.launch import standby
from tf_regtopk.launch import supervision
from tf_regtopk.launch import terminal
from tf_regtopk.launch import termination
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
    ending = termination.Termination(args.grace_seconds)
    try:
        group, told = groups.group_of(args)
        directory = _log_directory(args.log_dir, group.folder)
    except TimeoutError as error:
        terminal.say(str(error))
        return bootstrap.LOST_A_WORKER
    except (OSError, ValueError) as error:
        terminal.say(f"python -m tf_regtopk.run: {error}")
        return WRONG_ARGUMENTS
    if told:
        terminal.say(told)
    return _Launcher(args, group, ending).run(directory)


class _Launcher:
    """The launcher of a group's workers on this machine.

    Args:
        args: The command's arguments.
        group: `groups.Group`.
        ending: `termination.Termination`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        group: groups.Group,
        ending: termination.Termination,
    ) -> None:
        self._args, self._group, self._ending = args, group, ending
        # The arguments of `python` with which a worker would start by hand.
        option = ["-m"] if args.is_module else []
        self._command = [*option, args.script, *args.arguments]
        self._standbys = standby.Standbys(self._command)

    def run(self, directory: pathlib.Path) -> int:
        """Starts the workers until they succeed, or as often as they may fail.

        Args:
            directory: Folder for a folder of each attempt.

        Returns:
            The exit status.
        """
        status = bootstrap.FAILED
        try:
            status = self._run(directory)
        except TimeoutError as error:
            terminal.say(str(error))
            status = bootstrap.LOST_A_WORKER
        except ValueError as error:
            terminal.say(f"python -m tf_regtopk.run: {error}")
            status = WRONG_ARGUMENTS
        except rendezvous.TrainingOverError as over:
            terminal.say("The others have ended the training meanwhile.")
            status = over.status
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else status
            raise
        finally:
            self._standbys.end()
            self._ending.stop_waiting()
            self._group.leave(status)
        return status

    def _run(self, directory: pathlib.Path) -> int:
        num_port_tries = 1
        while True:
            of_attempt = _make_folder_of_attempt(directory)
            status = self._attempt(of_attempt)
            if status == 0:
                return 0
            if self._ending.is_requested:
                status = 128 + signal.SIGTERM
                self._say_end(status, of_attempt)
                return status
            num_port_tries += 1
            if status != bootstrap.PORT_TAKEN or not self._group.chooses_ports:
                num_port_tries = 1
            elif num_port_tries <= _MAX_PORT_TRIES:
                terminal.say("A port was taken meanwhile. Trying others.")
                continue
            if not self._starts_again(status, of_attempt):
                self._say_end(status, of_attempt)
                return status

    def _starts_again(self, status: int, directory: pathlib.Path) -> bool:
        """Says whether and from where the workers start again."""
        group = self._group
        where = _where_it_goes_on(directory)
        if status == bootstrap.BACKED_UP and group.is_elastic:
            terminal.say(f"All workers start again, {where}.")
            return True
        if group.num_restarts >= self._args.max_restarts:
            return False
        group.num_restarts += 1
        terminal.say(
            f"Restart {group.num_restarts} of {self._args.max_restarts}: all "
            f"workers start again, {where}."
        )
        time.sleep(group.pause)
        return True

    def _say_end(self, status: int, directory: pathlib.Path) -> None:
        """Says that the launcher ends, and what another start would do."""
        num_restarts, most = self._group.num_restarts, self._args.max_restarts
        terminal.say(
            f"The launcher ends with status {status}, after {num_restarts} of "
            f"{most} restarts (`--max_restarts`). The same command starts "
            f"again, {_where_it_goes_on(directory)}."
        )

    def _attempt(self, directory: pathlib.Path) -> int:
        """Starts all workers once, and returns the status of their end."""
        workers: list[worker_lib.Worker] = []
        try:
            for place in self._group.places():
                workers.append(
                    worker_lib.Worker(
                        place,
                        self._command,
                        directory,
                        terminal.shower(self._args.show, place),
                        self._standbys if self._args.standby else None,
                    )
                )
            self._standbys.end()  # Those that fit nowhere.
            pids = ", ".join(str(worker.pid) for worker in workers)
            num_standbys = sum(worker.was_standby for worker in workers)
            stood_by = f"{num_standbys} from standbys, " if num_standbys else ""
            terminal.say(
                f"Started {_count(len(workers), 'worker')} (processes {pids}), "
                f"{stood_by}with their output in {directory}"
            )
            failures = self._wait_for(workers, directory)
        finally:
            for worker in workers:
                worker.end()
        own = [_detailed(failure, workers, self._group) for failure in failures]
        # Several machines may tell of the same failure, one with its details.
        told = sorted(self._group.settle(own), key=lambda f: bool(f.details))
        failures = list({failure.name: failure for failure in told}.values())
        # Others may leave once all is done.
        has_others = any(not (f.is_asked or f.is_leaving) for f in failures)
        if not has_others and all(worker.has_succeeded for worker in workers):
            return 0
        causes = (
            [f for f in failures if not (f.is_lost or f.is_asked)]
            or [f for f in failures if not f.is_lost]
            or failures
        )
        terminal.say("\n".join(_report(causes, workers)))
        return _status(causes)

    def _wait_for(
        self, workers: Sequence[worker_lib.Worker], directory: pathlib.Path
    ) -> list[worker_lib.Failure]:
        def can_back_up() -> bool:
            return notes.count(directory, "can_back_up") > 0

        def reason_to_end() -> str:
            if self._ending.is_requested:
                return "SIGTERM ends the launcher"
            return self._group.reason_to_resize()

        def start_standbys() -> None:
            if self._args.standby and self._may_start_again:
                self._standbys.start_once_backed_up(
                    [worker.place for worker in workers], directory
                )

        with self._ending.waiting_if(can_back_up):
            return supervision.wait_for(
                workers,
                directory,
                self._args.start_timeout,
                self._group.failures_elsewhere,
                reason_to_end,
                start_standbys,
            )

    @property
    def _may_start_again(self) -> bool:
        group = self._group
        return group.is_elastic or group.num_restarts < self._args.max_restarts


def _status(causes: Sequence[worker_lib.Failure]) -> int:
    """Returns the exit status for the causes of an end."""
    if all(failure.is_asked or failure.is_leaving for failure in causes):
        return bootstrap.BACKED_UP
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
    if failure.is_asked:
        return failure
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
    # An attempt may end before the script comes so far.
    of_attempts = directory.parent.glob("attempt-*")
    backups = sorted(
        {b for each in of_attempts for b in notes.read(each, "backup")}
    )
    if not backups:
        return (
            "from the beginning, because the script has not called "
            "`tf_regtopk.Backup.restore`"
        )
    return f"from the last backup that all have in {', '.join(backups)}"


def _log_directory(log_dir: str | None, folder: str) -> pathlib.Path:
    """Makes the folder for the output of this machine's workers."""
    parent = log_dir or tempfile.mkdtemp(prefix="tf_regtopk-")
    # A script may change its working directory.
    directory = (pathlib.Path(parent) / folder).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _make_folder_of_attempt(directory: pathlib.Path) -> pathlib.Path:
    """Makes the folder after those of all attempts, also of earlier runs."""
    names = [path.name for path in directory.glob("attempt-*")]
    numbers = [int(name.rpartition("-")[2]) for name in names]
    for number in itertools.count(max(numbers, default=-1) + 1):
        # Another launcher may be quicker.
        with contextlib.suppress(FileExistsError):
            folder = directory / f"attempt-{number}"
            folder.mkdir()
            return folder
    raise AssertionError("There is no largest number.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
