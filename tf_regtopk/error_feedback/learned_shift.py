"""Error accumulation around a learned shift of the gradient."""

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
class LearnedShift(base.ErrorFeedback):
    r"""Error accumulation around a slowly learned shift h of the gradient.

        a = e + g - h,      e = a - sent,           h = h + rate sent
        aggregate = H + total,                      H = H + rate total

    H is the sum of all h. At a fixed point h is the local gradient g, or
    g / (1 - m) at once, so that what is left to send goes to zero. The
    aggregates of all steps and the errors add up to all gradients: nothing is
    lost. With local momentum m, for which the inner optimizer is plain SGD:

        u = m u + g - h,    a = e + u,              e = a - sent
        p = m p + H,        aggregate = total + p
        h = h + rate (1 - m) sent,                  H alike
        u = 0 where sent                            (factor masking)

    In the steps that follow, a gradient g adds m g, m^2 g and so on to u: with
    g itself, that is g / (1 - m). All of it can enter the residual error at
    once, because there it waits for many steps anyway:

        a = e + g / (1 - m) - h,    and the rest as without momentum.

    It keeps e and h, and the shared H; with momentum u and p as well, unless it
    is at once.

    Args:
        rate: Float in (0, 1], or None for the density (of the entries that are
            in the total, if owners keep a part only). In the distributed
            linear regression a quarter of the density learns too slowly, and
            four times the density diverges.
        momentum: Float m in [0, 1).
        factor_masking: Boolean. Whether the momentum of each sent entry is
            cleared. That has helped where the data of the workers are alike,
            and has harmed where they differ.
        at_once: Boolean. Whether the momentum of a gradient is added in the
            step of the gradient. Where all entries are sent, as by
            `exchange="dense"`, it is the usual momentum nevertheless.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule, or `factor_masking` goes
            without `momentum` or with `at_once`.

    Example:

    >>> LearnedShift(momentum=0.9).num_local  # e, h and u.
    3
    >>> LearnedShift(momentum=0.9, at_once=True).num_local
    2

    A relative of EC-SGD-DIANA (Gorbunov et al., 2020), which learns the shift
    from a second message.
    """

    residual_place: ClassVar[int | None] = 0

    rate: float | None = None
    momentum: float = 0.0
    factor_masking: bool = False
    at_once: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None:
            self._check_number("rate", "in (0, 1]", lambda r: 0 < r <= 1)
        self._check_number("momentum", "in [0, 1)", lambda m: 0 <= m < 1)
        base.check_factor_masking(self.factor_masking, self.momentum)
        validation.check_boolean("at_once", self.at_once)
        if self.at_once and self.factor_masking:
            raise ValueError(
                "`factor_masking` must be False with `at_once`, because then "
                "no momentum is kept that could be masked. Received: "
                "factor_masking=True, at_once=True"
            )

    @property
    def has_momentum(self) -> bool:
        return self.momentum > 0

    @property
    def num_local(self) -> int:
        return 3 if self._keeps_momentum else 2

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        return (tf.zeros([size], dtype),) * (2 if self._keeps_momentum else 1)

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        del shared, context
        if not self._keeps_momentum:
            e, h = local
            if self.momentum:
                gradient *= 1 / (1 - self.momentum)
            a = e + (gradient - h)
            return a, (a, h)
        e, h, u = local
        u = self.momentum * u + (gradient - h)
        a = e + u
        return a, (a, h, u)

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        a, h, *u = local
        e = equations.residual_error(a, indices, sent)
        h = equations.add_sent(h, indices, self._rate(context) * sent)
        if self.factor_masking:
            u = [equations.clear_sent(u[0], indices, sent)]
        return (e, h, *u)

    def add_error(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del total
        e, h, *u = local
        e = equations.add_sent(e, indices, error)
        h = equations.add_sent(h, indices, -self._rate(context) * error)
        return (e, h, *u)

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        h_sum = shared[0] + self._rate(context) * total
        if not self._keeps_momentum:
            return shared[0] + total, (h_sum,)
        p = self.momentum * shared[1] + shared[0]
        return total + p, (h_sum, p)

    def when_dense(self) -> base.ErrorFeedback:
        # Factor masking is left out, because no entry is held back here.
        return momentum_of_sum.momentum_of_sum(self.momentum)

    def _rate(self, context: base.StepContext) -> float | tf.Tensor:
        rate = context.applied_density if self.rate is None else self.rate
        return rate * (1 - self.momentum) if self._keeps_momentum else rate

    @property
    def _keeps_momentum(self) -> bool:
        return self.momentum > 0 and not self.at_once
