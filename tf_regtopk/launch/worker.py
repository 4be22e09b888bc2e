"""A worker: a process that runs the user's script, seen from the launcher."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import threading
import time
from typing import Any

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import cluster
from tf_regtopk.launch import notes
from tf_regtopk.launch import process
from tf_regtopk.launch import standby as standby_lib

# Seconds in which the rest of a worker's output is read once it has ended.
_READ_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure of a worker, or of a machine.

    Args:
        name: Name of the worker or machine.
        what: Says what has happened to it, as the end of a sentence.
        is_lost: Whether it has failed because it lost another worker.
        is_own: Whether its script has ended it.
        is_port_taken: Whether it could not listen on its port.
        is_asked: Whether it has backed up and ended because it was asked to.
        is_leaving: Whether it has left where machines come and go.
        details: Lines on it, such as the last of its output.
    """

    name: str
    what: str
    is_lost: bool = False
    is_own: bool = False
    is_port_taken: bool = False
    is_asked: bool = False
    is_leaving: bool = False
    details: tuple[str, ...] = ()


class Worker:
    """A process that runs a script as one worker.

    Args:
        place: `cluster.Place`.
        command: The script and its arguments.
        directory: Folder for its log and its notes.
        show: Function that is called with each piece of its output, in bytes.
        standbys: `Standbys` of which one may become this worker, or None.
    """

    def __init__(
        self,
        place: cluster.Place,
        command: Sequence[str],
        directory: pathlib.Path,
        show: Callable[[bytes], Any],
        standbys: standby_lib.Standbys | None = None,
    ) -> None:
        self.place = place
        self.number, self.name = place.number, place.name
        self.log = directory / f"worker-{place.number}.log"
        self._directory, self._is_asked = directory, False
        self._error_file = directory / f"worker-{place.number}.error"
        self._since = time.monotonic()
        settings = {"error_file": str(self._error_file)}
        environment = {
            "TF_CONFIG": place.tf_config,
            notes.VARIABLE: str(directory),
        }
        popen = None
        if standbys:
            file = standby_lib.imports_file(directory, place)
            settings["imports_file"] = str(file)
            popen = standbys.become_worker(place, settings, environment)
        self.was_standby = popen is not None
        self._popen = popen or process.start(
            place, command, settings, environment
        )
        self.pid = self._popen.pid
        self._reader = threading.Thread(
            target=self._read, args=(show,), daemon=True
        )
        self._reader.start()

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._since

    @property
    def has_succeeded(self) -> bool:
        """True if it has ended with status 0."""
        return self._popen.poll() == 0

    def failure(self) -> Failure | None:
        """Returns how it has failed, None if it has not."""
        status = self._popen.poll()
        if status is None:
            # No other worker would notice that the only worker is stopped.
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            # macOS has it from Python 3.13 on.
            if hasattr(os, "waitid") and os.waitid(os.P_PID, self.pid, options):
                return Failure(self.name, "is stopped (SIGSTOP)")
            return None
        if status == 0:
            return None
        backed_up = notes.read(self._directory, "backed_up")
        # A second SIGTERM may have come after the backup.
        if status in (bootstrap.BACKED_UP, -signal.SIGTERM) and backed_up:
            return Failure(
                self.name,
                f"was asked to end, and has backed up {backed_up[-1]}",
                is_asked=True,
            )
        if status == -signal.SIGTERM and self._is_asked:
            return Failure(self.name, "ended as it was asked to", is_asked=True)
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", as when memory runs out" if name == "SIGKILL" else ""
            return Failure(self.name, f"was ended by {name}{hint}")
        error = None
        with contextlib.suppress(OSError, ValueError):
            error = json.loads(self._error_file.read_text())["error"]
        return Failure(
            self.name,
            f"ended with {error}" if error else f"ended with status {status}",
            is_lost=status == bootstrap.LOST_A_WORKER,
            is_own=True,
            is_port_taken=status == bootstrap.PORT_TAKEN,
        )

    def ask_to_end(self) -> None:
        """Asks it to back up and end, as preemption does."""
        self._is_asked = True
        self._popen.terminate()

    def end(self) -> None:
        """Ends it, and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self._reader.join(_READ_SECONDS)

    def last_lines(self, count: int) -> list[str]:
        """Returns the last lines of its output that say something."""
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode("utf-8", "replace")
        # A progress bar overwrites its line.
        lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return [line for line in lines if line.strip(" \b")][-count:]

    def _read(self, show: Callable[[bytes], Any]) -> None:
        """Copies its output into its log, and shows it."""
        assert self._popen.stdout is not None
        descriptor = self._popen.stdout.fileno()
        with open(self.log, "wb", buffering=0) as log:
            while piece := os.read(descriptor, 1 << 16):
                # A worker goes on when nobody reads or keeps its output.
                with contextlib.suppress(OSError):
                    log.write(piece)
                with contextlib.suppress(OSError):
                    show(piece)
