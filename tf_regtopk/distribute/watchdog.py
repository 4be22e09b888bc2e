"""A watchdog that terminates a worker which waits for another in vain."""

from collections.abc import Callable
import threading
import time
from typing import TypeVar

import tensorflow as tf

from tf_regtopk import keras_internals

# What a watched function returns: a structure of tensors.
_Result = TypeVar("_Result")


class Watchdog:
    """Aborts collectives that have been waiting for too long.

    Instead of TensorFlow's own `timeout_seconds`, for which each collective
    starts a thread that sleeps until the time is over, also when the collective
    has long ended: at 10 collectives a step and 10 steps a second 60,000
    threads, more than a process can have. Here two counters and one thread do.

    Args:
        timeout_seconds: Positive float.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        with tf.device("CPU:0"):
            self._entered, self._left = (
                tf.Variable(0, dtype=tf.int64, trainable=False)
                for _ in range(2)
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def watched(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function whose collectives are not to wait for ever.

        Args:
            function: Function of no arguments, called eagerly or in a graph,
                that returns a structure of tensors or per-replica values.

        Returns:
            What it returns.
        """
        with tf.control_dependencies([_add_one(self._entered)]):
            result = function()
        ends = tf.nest.flatten(result, expand_composites=True)
        with tf.control_dependencies(ends):
            _add_one(self._left)
        return result

    def _watch(self) -> None:
        last, since = None, time.monotonic()
        while True:
            time.sleep(min(self._timeout / 10, 5.0))
            left = int(self._left.numpy())
            if left == int(self._entered.numpy()) or left != last:
                last, since = left, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                keras_internals.abort_collectives(
                    "Another worker has not taken part in a collective for "
                    f"{self._timeout:g} s (`timeout_seconds`)."
                )
                return


def watched(
    function: Callable[[], _Result],
    strategy: tf.distribute.Strategy | None = None,
) -> _Result:
    """Calls `Watchdog.watched` if the strategy has a watchdog.

    Args:
        function: As of `Watchdog.watched`.
        strategy: A `tf.distribute.Strategy`. Defaults to the one in scope.
    """
    strategy = strategy or tf.distribute.get_strategy()
    watchdog = getattr(strategy, "watchdog", None)
    return watchdog.watched(function) if watchdog else function()


def _add_one(counter: tf.Variable) -> tf.Tensor:
    """Counts, now or when the graph runs."""
    if tf.executing_eagerly():
        return counter.assign_add(1)
    # With `read_value=True` the result would be a read of the variable,
    # and waiting for the read would not wait for the addition.
    return counter.assign_add(1, read_value=False)
