"""Momentum of the sum of whole gradients."""

import dataclasses

import tensorflow as tf

from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import equations
from tf_regtopk.error_feedback import no_feedback


@dataclasses.dataclass(frozen=True)
class MomentumOfSum(base.ErrorFeedback):
    """Momentum of the sum: rules with local momentum if every entry is sent.

        aggregate = U = m U + c total           total: the sum of all g

    Args:
        momentum: Float m in [0, 1).
        scale: Positive float c.
        clip_norm: As of `Accumulate`.
    """

    momentum: float
    scale: float = 1.0
    clip_norm: float | None = None

    num_local = 0

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        return (tf.zeros([size], dtype),) if self.momentum else ()

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        del shared
        if self.clip_norm is not None:
            gradient = equations.clip(
                gradient, self.clip_norm / context.num_replicas**0.5
            )
        return gradient, local

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del indices, sent, total, context
        return local

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        del context
        if not self.momentum:
            return self.scale * total, shared
        u = self.momentum * shared[0] + self.scale * total
        return u, (u,)


def momentum_of_sum(
    momentum: float, scale: float = 1.0, clip_norm: float | None = None
) -> base.ErrorFeedback:
    """Returns a `MomentumOfSum`, or `NoFeedback` without momentum and norm."""
    if not momentum and clip_norm is None:
        return no_feedback.NoFeedback()
    return MomentumOfSum(momentum, scale, clip_norm)
