"""What each replica keeps for itself between steps."""

import tensorflow as tf


class ReplicaState:
    """A structure of tensors that differs from replica to replica.

    To be created in the scope of the strategy; `local` is to be called in a
    replica context.

    Args:
        initial: Function that returns the structure (nested tuples) of tensors
            that every replica starts with.

    Example:

    >>> state = ReplicaState(lambda: (tf.zeros([2]), ()))
    >>> variable, _ = state.local()
    >>> variable.assign([1.0, 2.0]).numpy()
    array([1., 2.], dtype=float32)
    """

    def __init__(self, initial):
        self._strategy = tf.distribute.get_strategy()
        self._initial = initial
        # ON_READ without aggregation: each replica reads and writes its own
        # value, and nothing is ever reduced behind its back.
        self._variables = tf.nest.map_structure(
            lambda value: tf.Variable(
                value,
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.NONE,
            ),
            initial(),
        )

    def local(self):
        """This replica's structure of `tf.Variable`s."""

        def local_variable(variable):
            # In a replica context, `handle` is that of this replica's part.
            [local] = [
                part
                for part in self._strategy.experimental_local_results(variable)
                if part.handle is variable.handle
            ]
            return local

        return tf.nest.map_structure(local_variable, self._variables)

    def reset(self):
        """Puts all replicas of this process back to where they started."""

        def reset_local(variable, value):
            for local in self._strategy.experimental_local_results(variable):
                local.assign(value)

        tf.nest.map_structure(reset_local, self._variables, self._initial())

    def local_values(self):
        """One structure of tensors for each replica of this process."""
        flat = [
            self._strategy.experimental_local_results(variable)
            for variable in tf.nest.flatten(self._variables)
        ]
        return [
            tf.nest.pack_sequence_as(
                self._variables, [tf.convert_to_tensor(v) for v in values]
            )
            for values in zip(*flat, strict=True)
        ]
