"""Error accumulation, and Deep Gradient Compression."""

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import equations
from tf_regtopk.error_feedback import momentum_of_sum


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Accumulate(base.ErrorFeedback):
    r"""Error accumulation: what was not sent is added to the next gradient.

        a = e + g,          e = a - sent

    With local momentum m, of which each sent entry is cleared if
    `factor_masking` (Deep Gradient Compression; the inner optimizer then is
    plain SGD):

        u = m u + g,        a = e + u,          e = a - sent
        u = 0 where sent                        (factor masking)

    Args:
        momentum: Float m in [0, 1).
        factor_masking: Boolean.
        clip_norm: Positive float, or None. g is scaled down to a norm of at
            most `clip_norm / sqrt(N)` before it is accumulated, so that the sum
            of N independent ones is clipped to about `clip_norm`.
        follow_learning_rate: Boolean. Whether e is multiplied by the learning
            rate of the last step over that of this one, so that it moves the
            weights as far as if it had been sent at once. (Not in steps in
            which its variable has no gradient.)

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule, or `factor_masking` goes
            without `momentum`.

    Example:

    >>> dgc = Accumulate(momentum=0.9, factor_masking=True)

    Sources: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018); Lin
    et al., "Deep Gradient Compression" (2018).
    """

    residual_place: ClassVar[int | None] = 0

    momentum: float = 0.0
    factor_masking: bool = False
    clip_norm: float | None = None
    follow_learning_rate: bool = False

    def __post_init__(self) -> None:
        self._check_number("momentum", "in [0, 1)", lambda m: 0 <= m < 1)
        base.check_factor_masking(self.factor_masking, self.momentum)
        validation.check_boolean(
            "follow_learning_rate", self.follow_learning_rate
        )
        if self.clip_norm is not None:
            # The limit is above 0, as a smaller norm would be 0 in float32.
            self._check_number(
                "clip_norm",
                "positive, and at least 1e-37",
                lambda c: c >= 1e-37,
            )

    @property
    def num_local(self) -> int:
        return 2 if self.momentum else 1

    @property
    def has_momentum(self) -> bool:
        return self.momentum > 0

    @property
    def needs_learning_rate(self) -> bool:
        return self.follow_learning_rate

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        del size
        return (tf.zeros([], dtype),) if self.follow_learning_rate else ()

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        if self.clip_norm is not None:
            gradient = equations.clip(
                gradient, self.clip_norm / context.num_replicas**0.5
            )
        e, *u = local
        if self.follow_learning_rate:
            e *= _ratio(shared[0], tf.cast(context.learning_rate, e.dtype))
        if not self.momentum:
            a = equations.accumulate(e, gradient)
            return a, (a,)
        u = self.momentum * u[0] + gradient
        a = equations.accumulate(e, u)
        return a, (a, u)

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del total, context
        e = equations.residual_error(local[0], indices, sent)
        if not self.momentum:
            return (e,)
        if not self.factor_masking:
            return e, local[1]
        return e, equations.clear_sent(local[1], indices, sent)

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        if self.follow_learning_rate:
            shared = (tf.cast(context.learning_rate, total.dtype),)
        return total, shared

    def when_dense(self) -> base.ErrorFeedback:
        # Factor masking is for what was held back.
        return momentum_of_sum.momentum_of_sum(
            self.momentum, clip_norm=self.clip_norm
        )


def _ratio(previous: tf.Tensor, current: tf.Tensor) -> tf.Tensor:
    """`previous / current`, 1 where either is 0."""
    is_defined = (previous > 0) & (current > 0)
    one = tf.ones_like(current)
    return tf.where(
        is_defined, previous / tf.where(is_defined, current, one), one
    )
