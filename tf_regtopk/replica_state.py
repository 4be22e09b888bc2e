"""What each replica keeps for itself between steps."""

import tensorflow as tf


class ReplicaState:
    """The residual error and the sparsifier's memory, different per replica.

    To be created in the scope of the strategy; `read` and `assign` act on the
    replica in whose context they are called.

    Args:
        size: J, the number of entries of the flat gradient.
        dtype: Float dtype of the residual error.
        initial_memory: Tuple of tensors, the sparsifier's memory before the
            first step.
    """

    def __init__(self, size, dtype, initial_memory):
        self._strategy = tf.distribute.get_strategy()
        self._error = self._per_replica_variable(tf.zeros([size], dtype))
        self._memory = tuple(
            self._per_replica_variable(value) for value in initial_memory
        )
        self._initial_memory = initial_memory

    @staticmethod
    def _per_replica_variable(initial_value):
        # ON_READ without aggregation: each replica reads and writes its own
        # value, and nothing is ever reduced behind its back.
        return tf.Variable(
            initial_value,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.NONE,
        )

    def read(self):
        """`(error, memory)` of this replica, as tensors."""
        return (
            tf.convert_to_tensor(self._error),
            tuple(tf.convert_to_tensor(variable) for variable in self._memory),
        )

    def assign(self, error, memory):
        """Replaces the error and the memory of this replica."""
        self._error.assign(error)
        for variable, value in zip(self._memory, memory, strict=True):
            variable.assign(value)

    def reset(self):
        """Puts this process's replicas back to where they were at the start."""
        for variable, value in (
            (self._error, tf.zeros_like(self.local_errors()[0])),
            *zip(self._memory, self._initial_memory, strict=True),
        ):
            for local in self._strategy.experimental_local_results(variable):
                local.assign(value)

    def local_errors(self):
        """The residual errors of this process's replicas, each `[J]`."""
        return self._strategy.experimental_local_results(self._error)
