"""The steps in which replicas exchange weights, which may change meanwhile."""

from collections.abc import Callable

import keras
import tensorflow as tf


class ExchangeSchedule:
    """Counts the steps of a period, and the exchanges.

    The replicas exchange in the first step of each period. All variables start
    at 0, as all counters of an optimizer, and are the same on all replicas.

    Args:
        first_period: Integer, the number of steps of a period at first.
    """

    def __init__(self, first_period: int) -> None:
        self.first_period = first_period
        self.variables: list[keras.Variable] = []

    def build(self, add_variable: Callable[..., keras.Variable]) -> None:
        """Creates the variables.

        Args:
            add_variable: `keras.optimizers.Optimizer.add_variable`.
        """
        self._longer, self._place, self._num_exchanges = self.variables = [
            add_variable(
                shape=(),
                dtype="int64",
                aggregation="only_first_replica",
                name=name,
            )
            # How many steps a period is longer than the first one; how many
            # steps of a period are over.
            for name in ("longer_period", "steps_of_period", "num_exchanges")
        ]

    @property
    def period(self) -> int:
        """Number of steps of a period."""
        if not self.variables:
            return self.first_period
        return self.first_period + int(self._longer.numpy())

    def set_period(self, period: int) -> None:
        """Sets the number of steps of a period, also of the one that has begun.

        To be called outside of the replicas, on all workers alike.

        Args:
            period: Integer of at least 1.
        """
        if self.variables:
            self._longer.assign(period - self.first_period)
        else:
            self.first_period = period

    def take_turn(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Counts a step, in a replica context.

        Returns:
            `(is_time, number)`: a scalar bool tensor, whether the replicas
            exchange in this step, and a scalar int64 tensor, the number of
            exchanges before.
        """
        longer, place, number = (
            variable.value.read_value() for variable in self.variables
        )
        with tf.device("CPU:0"):
            is_over = place >= self.first_period + longer
            is_time = is_over | tf.equal(place, 0)
            following = tf.where(is_over, tf.ones_like(place), place + 1)
        self._place.assign(following)
        self._num_exchanges.assign_add(tf.cast(is_time, tf.int64))
        return is_time, number
