"""Adam of the sum of whole gradients."""

import dataclasses

import tensorflow as tf

from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import no_feedback


@dataclasses.dataclass(frozen=True)
class AdamOfSum(no_feedback.NoFeedback):
    """Adam's steps of the sum: `LocalAdam` if every entry is sent.

        m = beta_1 m + (1 - beta_1) total       total: the sum of all g
        v = beta_2 v + (1 - beta_2) total^2
        c_i = beta_i c_i + (1 - beta_i)         1 - beta_i^t after t steps
        aggregate = (m / c_1) / ((sqrt(v) + epsilon) / sqrt(c_2))

    As in Keras, which adds epsilon before the correction of v.

    All of it is shared.

    Args:
        beta_1: Float in [0, 1).
        beta_2: Float in (0, 1).
        epsilon: Float of at least 0, as of `keras.optimizers.Adam`.
    """

    beta_1: float
    beta_2: float
    epsilon: float = 1e-7

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        vector, scalar = tf.zeros([size], dtype), tf.zeros([], dtype)
        return vector, vector, scalar, scalar

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        del context
        values = (total, total**2, 1.0, 1.0)
        betas = (self.beta_1, self.beta_2) * 2
        m, v, c_1, c_2 = after = tuple(
            beta * before + (1 - beta) * value
            for beta, before, value in zip(betas, shared, values, strict=True)
        )
        root = (tf.sqrt(v) + self.epsilon) / tf.sqrt(c_2)
        return (m / c_1) / root, after
