"""EF21: the replicas send what changes in their gradients."""

import dataclasses

import keras
import tensorflow as tf

from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import equations
from tf_regtopk.error_feedback import momentum_of_sum


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class EF21(base.ErrorFeedback):
    r"""EF21: the replicas send what changes in their gradients.

        v = (1 - eta) v + eta g,    a = v - h,      h = h + sent
        aggregate = H = H + total                   H: the sum of all h

    With eta = 1, v is g itself; with less this is EF21-SGDM, for stochastic
    gradients. What was not sent is in the next difference again.

    Args:
        momentum: Float eta in (0, 1], the weight of the new gradient: 1 is no
            momentum, and 0.1 averages as the momentum 0.9 of SGD does.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> EF21().has_momentum, EF21(momentum=0.1).has_momentum
    (False, True)

    Sources: Richtarik, Sokolov, Fatkhullin, "EF21" (2021); Fatkhullin,
    Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!" (2023).
    """

    momentum: float = 1.0

    def __post_init__(self) -> None:
        self._check_number("momentum", "in (0, 1]", lambda m: 0 < m <= 1)

    @property
    def has_momentum(self) -> bool:
        return self.momentum < 1

    @property
    def num_local(self) -> int:
        return 1 if self.momentum == 1 else 2

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        return (tf.zeros([size], dtype),)

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        del shared, context
        if self.momentum == 1:
            [h] = local
            return gradient - h, local
        h, v = local
        v = (1 - self.momentum) * v + self.momentum * gradient
        return v - h, (h, v)

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del total, context
        h = equations.add_sent(local[0], indices, sent)
        return (h, *local[1:])

    def add_error(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del total, context
        return (equations.add_sent(local[0], indices, -error), *local[1:])

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        del context
        [h_sum] = shared
        h_sum += total
        return h_sum, (h_sum,)

    def when_dense(self) -> base.ErrorFeedback:
        return momentum_of_sum.momentum_of_sum(
            1 - self.momentum, scale=self.momentum
        )
