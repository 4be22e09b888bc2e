"""The state of each replica, which differs from that of the others."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import topology
from tf_regtopk.kernels import words


class ReplicaState:
    """A structure of tensors that differs from replica to replica.

    To be created in the scope of the strategy; `variables` is to be called in a
    replica context. Variables of integers of 32 bits hold them as `words.hold`
    does; arrays have the dtypes of the initial structure.

    Args:
        initial: Function that returns the structure (nested tuples) of tensors
            that every replica starts with.
        participants: `topology.Participants`: those of which each has a state;
            where they are whole workers, all their replicas have the same.
            Defaults to the replicas.

    Example:

    >>> state = ReplicaState(lambda: (tf.zeros([2]), ()))
    >>> variable, _ = state.variables()
    >>> variable.assign([1.0, 2.0]).numpy()
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        initial: Callable[[], Any],
        participants: topology.Participants | None = None,
    ) -> None:
        self._strategy = tf.distribute.get_strategy()
        self._participants = participants or topology.Participants()
        self._initial = initial
        values = initial()
        # The structure of the tensors' own dtypes.
        self.dtypes = tf.nest.map_structure(lambda v: v.dtype, values)
        # ON_READ without aggregation: each replica reads and writes its own
        # value, and nothing is ever reduced behind its back.
        # No worker tells another the initial values, because all are alike.
        with keras_internals.initial_values_of_each_worker():
            self._variables = tf.nest.map_structure(
                lambda value: tf.Variable(
                    words.hold(value),
                    trainable=False,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.NONE,
                ),
                values,
            )

    def variables(self) -> Any:
        """This replica's structure of `tf.Variable`s."""
        return tf.nest.map_structure(
            lambda variable: local_part(variable, self._strategy),
            self._variables,
        )

    @property
    def replicas(self) -> range:
        """The ranks of this process's participants."""
        return self._participants.local_ranks

    @property
    def num_replicas(self) -> int:
        """Number of participants, on all workers."""
        return self._participants.count

    def initial_arrays(self) -> list[list[np.ndarray]]:
        """For each part of the structure the list of its NumPy arrays."""
        return [
            [value.numpy() for value in tf.nest.flatten(part)]
            for part in self._initial()
        ]

    def local_arrays(self) -> list[list[np.ndarray]]:
        """For each replica of this process its list of arrays."""
        copies = self._participants.copies
        return [
            [
                words.release_array(parts[i * copies].numpy(), dtype)
                for parts, dtype in self._parts()
            ]
            for i in range(len(self.replicas))
        ]

    def assign_local(self, values: Sequence[Sequence[npt.ArrayLike]]) -> None:
        """Sets the state of the replicas of this process.

        Args:
            values: For each replica of this process its list of arrays.
        """
        copies = self._participants.copies
        for i, arrays in enumerate(values):
            for (parts, dtype), array in zip(
                self._parts(), arrays, strict=True
            ):
                held = words.hold_array(array, dtype)
                for part in parts[i * copies : (i + 1) * copies]:
                    part.assign(held)

    def _parts(self) -> list[tuple[tuple[tf.Variable, ...], tf.DType]]:
        """For each variable its parts in this process, and its dtype."""
        return [
            (self._strategy.experimental_local_results(variable), dtype)
            for variable, dtype in zip(
                tf.nest.flatten(self._variables),
                tf.nest.flatten(self.dtypes),
                strict=True,
            )
        ]


def local_part(
    variable: tf.Variable | keras.Variable, strategy: tf.distribute.Strategy
) -> tf.Variable:
    """Returns this replica's part of a variable, which it may assign alone.

    To be called in a replica context.

    Args:
        variable: Variable, created in the scope of the strategy.
        strategy: `tf.distribute.Strategy`.
    """
    if isinstance(variable, keras.Variable):
        variable = variable.value
    # `handle` is that of this replica's part in a replica context.
    [local] = [
        part
        for part in parts(variable, strategy)
        if part.handle is variable.handle
    ]
    return local


def parts(
    variable: tf.Variable | keras.Variable, strategy: tf.distribute.Strategy
) -> tuple[tf.Variable, ...]:
    """Returns the parts of a variable on the replicas of this process.

    Args:
        variable: As of `local_part`.
        strategy: As of `local_part`.
    """
    if isinstance(variable, keras.Variable):
        variable = variable.value
    return strategy.experimental_local_results(variable)
