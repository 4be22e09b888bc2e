"""The steps in which replicas exchange weights, which may change meanwhile."""

from collections.abc import Callable

import keras
import tensorflow as tf


class ExchangeSchedule:
    """Counts the steps of a period, and the exchanges.

    The replicas exchange in the first step of each period. All variables are
    the same on all replicas, and may be set to 0, as all counters of an
    optimizer: then the period is the first one again.

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
        self._period, self._place, self._num_exchanges = self.variables = [
            add_variable(
                shape=(),
                initializer=keras.initializers.Constant(value),
                dtype="int64",
                aggregation="only_first_replica",
                name=name,
            )
            # `steps_of_period` are those of a period that are over.
            for name, value in (
                ("period", self.first_period),
                ("steps_of_period", 0),
                ("num_exchanges", 0),
            )
        ]

    @property
    def period(self) -> int:
        """Number of steps of a period."""
        if not self.variables:
            return self.first_period
        return int(self._period.numpy()) or self.first_period

    def set_period(self, period: int) -> None:
        """Sets the number of steps of a period, also of the one that has begun.

        To be called outside of the replicas, on all workers alike.

        Args:
            period: Integer of at least 1.
        """
        if self.variables:
            self._period.assign(period)
        else:
            self.first_period = period

    def take_turn(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Counts a step, in a replica context.

        Returns:
            `(is_time, number)`: a scalar bool tensor, whether the replicas
            exchange in this step, and a scalar int64 tensor, the number of
            exchanges before.
        """
        period, place, number = (
            variable.value.read_value() for variable in self.variables
        )
        with tf.device("CPU:0"):
            first = tf.constant(self.first_period, tf.int64)
            is_over = place >= tf.where(tf.equal(period, 0), first, period)
            is_time = is_over | tf.equal(place, 0)
            following = tf.where(is_over, tf.ones_like(place), place + 1)
        self._place.assign(following)
        self._num_exchanges.assign_add(tf.cast(is_time, tf.int64))
        return is_time, number
