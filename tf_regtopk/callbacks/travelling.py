"""Weights that travel: each replica gets those of another one for a while."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import vector_exchange
from tf_regtopk.optimizers import averaging
from tf_regtopk.steps import flat_buffer


class Travel:
    """Hands the weights of each replica to the next one.

    To be created outside of the replicas, on all workers alike.

    Args:
        variables: List of variables of floats.
        strategy: Their `tf.distribute.Strategy`, of several replicas.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        strategy: tf.distribute.Strategy,
    ) -> None:
        self._variables = variables
        self._strategy = strategy
        self._buffer = flat_buffer.FlatBuffer.for_variables(variables)
        n = strategy.num_replicas_in_sync
        # Row i has its 1 in column i - 1.
        matrix = np.roll(np.eye(n), 1, axis=0)
        with strategy.scope():
            self._exchange = vector_exchange.VectorExchange(
                [((mixing.Cycle(range(n)),),)], matrix[np.newaxis]
            )
        self._number = 0
        self._shift = tf.function(self._of_replica, autograph=False)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Gives each replica the weights of the one before, for a while.

        All workers have to enter at the same time.
        """
        with averaging.weights_kept(self._variables, self._strategy):
            number = tf.constant(self._number, tf.int64)
            self._number += 1
            self._strategy.run(self._shift, args=(number,))
            yield

    def _of_replica(self, number: tf.Tensor) -> None:
        local = [
            replica_state.local_part(variable, self._strategy)
            for variable in self._variables
        ]
        vectors = self._buffer.vectors([part.read_value() for part in local])
        received = self._exchange.sum(tf.concat(vectors, axis=0), number)
        for part, values in zip(
            local, self._buffer.split(received), strict=True
        ):
            part.assign(values)
