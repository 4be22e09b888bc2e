"""SIGTERM during `fit`, and how workers agree on where they end."""

from collections.abc import Callable
import inspect
import os
import signal
import threading
import time
from types import CodeType
from types import FrameType
from typing import Any

import tensorflow as tf

from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.launch import notes

# The exit status of a process that SIGTERM has ended, as shells have it.
ENDED_BY_SIGTERM = 128 + signal.SIGTERM

_MILLISECONDS_BETWEEN_CHECKS = 1000
# The first steps take long, because they are compiled.
_MAX_GROWTH = 10
_MAX_INT32 = 2**31 - 1


class Request:
    """Notes that the process was asked to end, by SIGTERM, while `fit` runs.

    A second SIGTERM ends the process at once, unless a launcher has started it:
    Slurm sends SIGTERM to both, and the launcher passes its own on. One that
    comes outside `fit` ends the process too, also if an error has ended `fit`,
    and one to a process that was forked in `fit`.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._code: CodeType | None = None
        self._pid = 0

    def await_in(self, function: Callable[..., Any]) -> bool:
        """Waits for SIGTERM from here on, unless others handle it.

        Args:
            function: The function that is running, `fit`.

        Returns:
            Whether it waits.
        """
        self.is_made = False
        self._code = getattr(inspect.unwrap(function), "__code__", None)
        self._pid = os.getpid()
        handler = signal.getsignal(signal.SIGTERM)
        # An error may have ended `fit` before, and left a handler of ours.
        is_ours = isinstance(getattr(handler, "__self__", None), Request)
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not (handler == signal.SIG_DFL or is_ours):
            return False
        signal.signal(signal.SIGTERM, self._handle)
        return True

    def stop(self) -> None:
        """Puts the default handler back."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_for_fit = os.getpid() == self._pid and _is_running(self._code, frame)
        if not (is_for_fit and notes.has_launcher()):
            # From here on SIGTERM also ends a process that waits for others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if is_for_fit:
            self.is_made = True
        else:
            os.kill(os.getpid(), number)


def _is_running(code: CodeType | None, frame: FrameType | None) -> bool:
    while frame and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Checks:
    """Checks on all workers whether one was asked to end, about once a second.

    With a single worker after every step, which costs nothing.

    Args:
        strategy: The `tf.distribute.Strategy` of the workers.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._is_alone = strategy_lib.worker_number(strategy)[1] == 1
        self._strategy = strategy
        # Every worker has the same numbers of steps, and so meets the others.
        self._num_steps, self._interval = 0, 1
        self._since = time.monotonic()

    def after_steps(self, num_steps: int, is_asked: bool) -> bool:
        """Returns whether all are to end now; to be called by all alike.

        Args:
            num_steps: The number of steps taken since the last call.
            is_asked: Whether this worker was asked to end.
        """
        if self._is_alone:
            return is_asked
        self._num_steps += num_steps
        if self._num_steps < self._interval:
            return False
        is_asked, milliseconds = self._gather(is_asked)
        self._interval = _interval(self._num_steps, milliseconds)
        self._begin()
        return is_asked

    def now(self, is_asked: bool) -> bool:
        """Returns whether all are to end, without waiting for more steps."""
        if self._is_alone:
            return is_asked
        is_asked, milliseconds = self._gather(is_asked)
        if self._num_steps:
            # Else an interval longer than an epoch would stay for ever.
            in_time = _steps_in_time(self._num_steps, milliseconds)
            self._interval = max(1, min(self._interval, in_time))
        self._begin()
        return is_asked

    def _gather(self, is_asked: bool) -> tuple[bool, int]:
        """Gathers whether any worker was asked to end, and the longest time."""
        elapsed = int(1000 * (time.monotonic() - self._since))
        of_all = collectives.gather_from_workers(
            [int(is_asked), min(elapsed, _MAX_INT32)], self._strategy
        )
        return bool(of_all[:, 0].any()), int(of_all[:, 1].max())

    def _begin(self) -> None:
        self._num_steps, self._since = 0, time.monotonic()


def _interval(num_steps: int, milliseconds: int) -> int:
    """Number of steps to the next check, after so many in so much time.

    Example:

    >>> _interval(1, 20_000), _interval(1, 5), _interval(10, 50)
    (1, 10, 100)
    >>> _interval(100, 800)
    125
    """
    in_time = _steps_in_time(num_steps, milliseconds)
    return max(1, min(in_time, _MAX_GROWTH * num_steps))


def _steps_in_time(num_steps: int, milliseconds: int) -> int:
    """Number of steps between two checks, at the speed of these steps."""
    return round(
        num_steps * _MILLISECONDS_BETWEEN_CHECKS / max(milliseconds, 1)
    )
