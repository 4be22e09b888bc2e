"""Runs a user's script as one worker, and records how the script failed.

    python bootstrap.py SETTINGS [-m] SCRIPT [arguments]

The launcher starts this file by its path, so that the worker imports TensorFlow
when its script does, and nothing of this package before.
"""

from collections.abc import Mapping
import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
from types import ModuleType
from typing import Any
from typing import NoReturn

# Exit statuses of a worker, beside 0 and those that a script chooses.
FAILED, LOST_A_WORKER, PORT_TAKEN = 1, 3, 4
# That of a worker that has backed up because SIGTERM has asked it to end.
BACKED_UP = 128 + signal.SIGTERM

# What TensorFlow raises in a collective that other workers have left.
_LOST_ERRORS = (
    "AbortedError",
    "CancelledError",
    "DeadlineExceededError",
    "UnavailableError",
)
# How lines begin on where an operation was made.
_PLACES = ("Detected at node", '  File "', "<stack traces unavailable>")
_NAMED = re.compile(r"\s*[\w.]*(Error|Exception|Exit|Interrupt)\b.*: ")
_PR_SET_PDEATHSIG = 1
# Modules whose import takes seconds.
_SLOW_MODULES = ("tensorflow", "keras", "tf_regtopk")


def status_of(error: BaseException) -> int:
    """Returns the exit status of a worker that an error has ended."""
    if "Could not start gRPC server" in str(error):
        return PORT_TAKEN
    is_tensorflows = type(error).__module__.startswith("tensorflow.")
    if is_tensorflows and type(error).__name__ in _LOST_ERRORS:
        return LOST_A_WORKER
    return FAILED


def message_of(error: BaseException) -> str:
    """Returns the line of an error that says what has happened."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Graph execution error:"):
        # TensorFlow first says where its operations were made.
        places = [i for i, x in enumerate(lines) if x.startswith(_PLACES)]
        lines = lines[max(places, default=0) + 1 :] or lines
    if lines and lines[0].endswith(":"):
        # AutoGraph first shows the code in which the error was raised.
        lines = [x for x in lines if _NAMED.match(x)][-1:] or lines
    # The rest of what TensorFlow says are its own operations.
    line = lines[0].strip() if lines else ""
    if isinstance(error, OSError) and error.errno:
        reason = os.strerror(error.errno)
        if reason not in line:  # HDF5 says the reason lines later.
            line = f"{line} ({reason})"
    return line


def main(settings: dict[str, Any], command: list[str]) -> None:
    """Runs a script or a module as `python` with this command does.

    Args:
        settings: Dict with `error_file`, the path of a file to write;
            `cores`, the numbers of the cores to run on, or None; `launcher`,
            the number of the process that this one ends with; and, where there
            are standbys, `imports_file`, the path of another file to write. A
            standby has `stands_by` in place of the files. It reads from its
            input what to import, and, when it is needed, the files and
            variables of the environment.
        command: Path of the script, or "-m" and the name of the module; and its
            arguments.
    """
    _end_with(settings["launcher"])
    if settings["cores"]:
        os.sched_setaffinity(0, settings["cores"])
    # Python would set them so for the script.
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    script = sys.argv[0]
    directory = "" if is_module else os.path.dirname(script)
    sys.path[0] = os.path.abspath(directory)
    if settings.get("stands_by"):
        settings = _stand_by()
    elif "imports_file" in settings:
        sys.meta_path.insert(0, _NotesOfImports(settings["imports_file"]))
    error_file = pathlib.Path(settings["error_file"])
    try:
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or end.code == 0:
            return
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else FAILED
        _end(error_file, status, f"sys.exit({end.code!r})")
    except BaseException as error:
        _print_traceback(error)
        message = f"{type(error).__name__}: {message_of(error)}"
        _end(error_file, status_of(error), message)


def _stand_by() -> dict[str, Any]:
    """Waits, with modules imported, until this process becomes a worker.

    Returns:
        The settings of the worker.
    """
    imports: list[Any] = _read_line()
    _import_as_noted(imports)
    settings: dict[str, Any] = _read_line()
    os.environ.update(settings["environment"])
    # For the standby of the attempt after this one.
    _write_for_owner(settings["imports_file"], imports)
    return settings


def _read_line() -> Any:
    """Reads what the launcher tells a standby; ends the process without."""
    line = sys.stdin.readline()
    if not line:  # The launcher has ended, or needs no further worker.
        os._exit(0)
    return json.loads(line)


def _write_for_owner(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a file that others cannot read, if possible."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    with (
        contextlib.suppress(OSError),
        open(path, "w", encoding="utf-8", opener=opener) as file,
    ):
        json.dump(value, file)


class _NotesOfImports:
    """Notes how the script imports the slow modules, for a standby.

    A finder that finds nothing, and that Python asks before the others.

    Args:
        path: Path of the file to write.
    """

    def __init__(self, path: str) -> None:
        self._file, self._noted = pathlib.Path(path), list[Any]()
        self._before = dict(os.environ)

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> None:
        """Notes the name, `sys.path`, and what has changed in the environment.

        Args:
            name: Name of the module.
            path: As for all finders.
            target: As for all finders.
        """
        if name in _SLOW_MODULES and name not in (n for n, *_ in self._noted):
            changes = _changes(self._before, os.environ)
            self._noted.append([name, list(sys.path), changes])
            _write_for_owner(self._file, self._noted)


def _import_as_noted(imports: list[Any]) -> None:
    """Imports modules as a worker has, and leaves all else as it was."""
    path, environment = list(sys.path), dict(os.environ)
    by_modules: dict[str, str | None] = {}
    for name, path_then, changes in imports:
        sys.path[:] = path_then
        _change_environment(_changes(os.environ, environment))
        _change_environment(changes)
        before = dict(os.environ)
        # The script will meet the error, if there is one.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
        by_modules |= _changes(before, os.environ)
    sys.path[:] = path
    _change_environment(_changes(os.environ, environment))
    _change_environment(by_modules)


def _changes(
    before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, str | None]:
    """Returns the variables that differ: their values after, None if gone."""
    names = {*before, *after}
    return {n: after.get(n) for n in names if before.get(n) != after.get(n)}


def _change_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _end(error_file: pathlib.Path, status: int, message: str) -> NoReturn:
    """Ends the process at once.

    At a regular exit TensorFlow may wait for workers that are gone.
    """
    with contextlib.suppress(OSError):
        error_file.write_text(json.dumps({"status": status, "error": message}))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status % 256)


def _print_traceback(error: BaseException) -> None:
    """Prints the traceback without the frames of this file and of `runpy`."""
    of_script = error.__traceback__
    while of_script and of_script.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        of_script = of_script.tb_next
    traceback.print_exception(type(error), error, of_script)


def _end_with(launcher: int) -> None:
    """Ends this process when the launcher ends, also where that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # It has ended already.
        os._exit(FAILED)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
