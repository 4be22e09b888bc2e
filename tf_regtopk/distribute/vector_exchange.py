"""Whole vectors of neighbours, added up."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import neighbours


class VectorExchange:
    """Gives each replica a sum of the vectors of its neighbours.

        sum over j of weights_ij v_j

    The vectors are sent as they are, without a header. To be created as
    `Neighbours` is.

    Args:
        steps: As of `Neighbours`.
        weights: As of `Neighbours`.
    """

    def __init__(
        self, steps: Sequence[mixing.Step], weights: np.ndarray
    ) -> None:
        self._neighbours = neighbours.Neighbours(steps, weights)

    def sum(self, vector: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Returns the sum for this replica.

        To be called in a replica context.

        Args:
            vector: float32 or float64 tensor `[J]` of this replica.
            number: As of `Neighbours.exchange`.

        Returns:
            Tensor `[J]` of that dtype.
        """
        dtype = vector.dtype
        # Words are what is exchanged; a float64 has two.
        held = tf.reshape(tf.bitcast(vector, tf.float32), [-1])
        received = self._neighbours.exchange(held, number)
        if dtype == tf.float64:
            received = tf.reshape(received, [received.shape[0], -1, 2])
        weights = tf.cast(self._neighbours.weights(number), dtype)
        return tf.linalg.matvec(
            tf.bitcast(received, dtype), weights, transpose_a=True
        )
