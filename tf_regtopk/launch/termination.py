"""The end of the launcher by a signal, before which its workers may back up."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import signal
import sys
from types import FrameType

from tf_regtopk.launch import terminal


class Termination:
    """The effect of signals on the launcher: SIGTERM may wait, others do not.

    A second SIGTERM ends the launcher at once, as does the end of the time.

    Args:
        grace_seconds: Seconds that the workers have after SIGTERM.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._may_wait: Callable[[], bool] = lambda: False
        self.is_requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # As under `nohup`.
                signal.signal(number, self._end)

    @contextlib.contextmanager
    def waiting_if(self, may_wait: Callable[[], bool]) -> Iterator[None]:
        """Lets SIGTERM wait for the workers within the block.

        Args:
            may_wait: Function that says whether the workers can back up.
        """
        self._may_wait = may_wait
        try:
            yield
        finally:
            self._may_wait = lambda: False

    def stop_waiting(self) -> None:
        """Takes the limit of the wait away, when the workers have ended."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Ends the launcher by way of its clean-up, or lets it wait first."""
        del frame
        can_wait = number == signal.SIGTERM and not self.is_requested
        if can_wait and self._may_wait():
            self.is_requested = True
            signal.signal(signal.SIGALRM, self._end_late)
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)
            return
        sys.exit(128 + number)

    def _end_late(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        terminal.say(
            f"The workers have not ended within {self._grace_seconds:g} s "
            "(`--grace_seconds`)."
        )
        sys.exit(128 + signal.SIGTERM)
