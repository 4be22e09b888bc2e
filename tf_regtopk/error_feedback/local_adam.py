"""Adam on each replica, before entries are selected."""

import dataclasses
import math

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.error_feedback import adam_of_sum
from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import error_accumulation


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class LocalAdam(base.ErrorFeedback):
    r"""Adam's scale of each entry, applied by each replica to its own gradient.

    Adam makes steps of about one size in all layers, however large the
    gradients of a layer are. Selected by magnitude, before Adam, the entries of
    layers with small gradients would wait the longest. So each replica divides
    its gradient g by the root of a running mean of its squares, and error
    feedback, selection and codec see the quotient x:

        w = beta_2 w + (1 - beta_2) N g^2,      c = beta_2 c + (1 - beta_2)
        s = sqrt(N w / c)
        x = g / (s + epsilon rms(s))            rms: over all J entries
        a = accumulate(e, x)                    and so on, by `error_feedback`

    N g is the gradient of the replica's own loss, as g carries the weight 1/N.
    (Stored like this, w keeps its meaning where N changes.) What arrives are
    steps of Adam, which the inner optimizer applies: SGD without momentum, with
    the learning rate of Adam.

    Adam's mean of gradients, of which the weights (1 - beta_1) beta_1^i sum to
    1, spreads a gradient over later steps. Here it enters at once, because
    entries wait in the residual error for many steps anyway. Where all entries
    are sent, as by `exchange="dense"`, the rule is Adam itself, of the sum.

    It keeps w and what `error_feedback` keeps, and the shared c.

    Args:
        error_feedback: `ErrorFeedback` without momentum or clipping of its own.
            Defaults to `Accumulate()`; `methods.recommended` takes
            `LearnedShift()`.
        beta_1: Float in [0, 1). Adam's, where all entries are sent.
        beta_2: Float in (0, 1). Adam's.
        epsilon: Positive float, in units of the root mean square of all s. It
            limits x where a replica's gradient is nearly always 0, as that of
            rare words is.
        dense_epsilon: Float of at least 0. Adam's, where all entries are sent.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> LocalAdam(beta_2=0.99).num_local
    2

    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization" (2015), for
    the scale and the correction by c.
    """

    error_feedback: base.ErrorFeedback = dataclasses.field(
        default_factory=error_accumulation.Accumulate
    )
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 0.1
    dense_epsilon: float = 1e-7

    def __post_init__(self) -> None:
        rule = self.error_feedback
        validation.check_instance(
            "error_feedback", rule, base.ErrorFeedback, "LearnedShift()"
        )
        if rule.has_momentum or getattr(rule, "clip_norm", None) is not None:
            raise ValueError(
                "`error_feedback` must have no momentum and no `clip_norm`, "
                "because Adam has a momentum, and gradients are clipped before "
                'it: give `beta_1`, and `clipping="replica"` to the optimizer. '
                f"Received: error_feedback={rule}"
            )
        self._check_number("beta_1", "in [0, 1)", lambda b: 0 <= b < 1)
        self._check_number("beta_2", "in (0, 1)", lambda b: 0 < b < 1)
        self._check_number("epsilon", "positive", lambda e: e > 0)
        self._check_number("dense_epsilon", "at least 0", lambda e: e >= 0)

    @property
    def residual_place(self) -> int | None:
        return self.error_feedback.residual_place

    @property
    def has_momentum(self) -> bool:
        return self.beta_1 > 0

    @property
    def needs_learning_rate(self) -> bool:
        return self.error_feedback.needs_learning_rate

    @property
    def num_local(self) -> int:
        return self.error_feedback.num_local + 1

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        inner = self.error_feedback.initial_shared(size, dtype)
        return (*inner, tf.zeros([], dtype))

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        *inner, w = local
        *inner_shared, c = shared
        w = self._mean(w, context.num_replicas * gradient**2)
        mean = context.num_replicas * w / self._mean(c, 1.0)
        rms = tf.sqrt(tf.reduce_mean(mean))
        x = tf.math.divide_no_nan(gradient, tf.sqrt(mean) + self.epsilon * rms)
        # Squares may overflow where gradients do not. NaN, because the step is
        # skipped then, and w stays as it was.
        x = tf.where(tf.math.is_finite(rms), x, tf.constant(math.nan, x.dtype))
        a, after = self.error_feedback.accumulate(
            tuple(inner), tuple(inner_shared), x, context
        )
        return a, (*after, w)

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        *inner, w = local
        after = self.error_feedback.update(
            tuple(inner), indices, sent, total, context
        )
        return (*after, w)

    def add_error(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        *inner, w = local
        after = self.error_feedback.add_error(
            tuple(inner), indices, error, total, context
        )
        return (*after, w)

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        *inner, c = shared
        aggregate, after = self.error_feedback.aggregate(
            tuple(inner), total, context
        )
        return aggregate, (*after, self._mean(c, 1.0))

    def when_dense(self) -> base.ErrorFeedback:
        return adam_of_sum.AdamOfSum(
            self.beta_1, self.beta_2, self.dense_epsilon
        )

    def _mean(self, before: tf.Tensor, value: tf.Tensor | float) -> tf.Tensor:
        """The running mean after one more value."""
        return self.beta_2 * before + (1 - self.beta_2) * value
