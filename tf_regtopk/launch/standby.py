"""Standbys: processes that have imported TensorFlow, for the next attempt.

The import takes seconds, and is done while the present attempt trains. What a
standby imports, and under which variables of the environment, a worker of the
present attempt has noted (`bootstrap.py`): a script may set some before.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import signal
import subprocess
from typing import Any

from tf_regtopk.launch import cluster
from tf_regtopk.launch import notes
from tf_regtopk.launch import process


class Standby:
    """A process that waits until it becomes a worker.

    Args:
        place: `cluster.Place` of the worker that it may follow.
        command: The script and its arguments.
        imports: What this worker has imported, as `bootstrap.py` notes it.
    """

    def __init__(
        self, place: cluster.Place, command: Sequence[str], imports: list[Any]
    ) -> None:
        self._place = place
        self._popen = process.start(
            place, command, {"stands_by": True}, {}, stdin=subprocess.PIPE
        )
        # Not in the command, which everybody on the machine can read: a script
        # may have put secrets into the environment.
        self._write(imports)

    def fits(self, place: cluster.Place) -> bool:
        """Returns whether it waits, with the cores and GPUs of a place.

        Libraries count the cores when they are imported.
        """
        own = self._place
        is_same = (own.cores, own.gpus) == (place.cores, place.gpus)
        return is_same and self._popen.poll() is None

    def become_worker(
        self, settings: Mapping[str, str], environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes] | None":
        """Lets it run the script.

        Args:
            settings: What `bootstrap.main` takes for the attempt.
            environment: Variables of the worker alone.

        Returns:
            The process, or None if it has ended.
        """
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError), self._popen.stdin:
            self._write({**settings, "environment": dict(environment)})
            return self._popen
        self.end()
        return None

    def _write(self, line: Any) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(line).encode() + b"\n")
        self._popen.stdin.flush()

    def end(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


class Standbys:
    """The standbys of this machine's workers.

    Args:
        command: The script and its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._waiting: list[Standby] = []
        self._tried_for: pathlib.Path | None = None

    def start_once_backed_up(
        self, places: Sequence[cluster.Place], directory: pathlib.Path
    ) -> None:
        """Starts one for each worker as soon as an attempt has a backup.

        Not before, because the imports would slow the compilation of the first
        step, and because training would go on from no later step.

        Args:
            places: Those of the workers.
            directory: Folder of the attempt.
        """
        if self._tried_for == directory or not notes.count(directory, "saved"):
            return
        self._tried_for = directory
        for place in places:
            file = imports_file(directory, place)
            with contextlib.suppress(OSError, ValueError):
                imports = json.loads(file.read_text())
                self._waiting.append(Standby(place, self._command, imports))

    def become_worker(
        self,
        place: cluster.Place,
        settings: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> "subprocess.Popen[bytes] | None":
        """Lets one that fits a place run the script, if there is one.

        Args:
            place: The worker's `cluster.Place`.
            settings: As of `Standby.become_worker`.
            environment: As of `Standby.become_worker`.

        Returns:
            The process, or None.
        """
        for standby in self._waiting:
            if standby.fits(place):
                self._waiting.remove(standby)
                return standby.become_worker(settings, environment)
        return None

    def end(self) -> None:
        """Ends those that wait."""
        while self._waiting:
            self._waiting.pop().end()


def imports_file(directory: pathlib.Path, place: cluster.Place) -> pathlib.Path:
    """Returns the path of a worker's note on its imports.

    Args:
        directory: Folder of the attempt.
        place: The worker's place.
    """
    return directory / f"worker-{place.number}.imports"
