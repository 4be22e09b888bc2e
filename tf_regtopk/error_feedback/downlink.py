"""Compression of the way back: what all replicas apply of their sum."""

import dataclasses

import keras
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import selection
from tf_regtopk import validation
from tf_regtopk.error_feedback import base
from tf_regtopk.error_feedback import equations
from tf_regtopk.error_feedback import error_accumulation
from tf_regtopk.sizes import selected


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class CompressedDownlink(base.ErrorFeedback):
    r"""Sparsifies and rounds the sum as well, and keeps the error of that.

    As a parameter server does to what it sends back. With `total` what the
    inner rule of error feedback makes of the replicas' sum, and an error E that
    is the same on all replicas:

        A = E + total
        aggregate = decode(encode(the k entries of A of largest magnitude))
        E = A - aggregate

    Sparse ternary compression as a whole is
    `tf_regtopk.methods.sparse_ternary_compression`.

    An all-gather sends no sum back: every replica computes the aggregate
    itself, and no byte is saved. This rule is for comparisons, and for programs
    that pass aggregates on.

    Args:
        error_feedback: `ErrorFeedback`, the rule for the way there. Defaults
            to `Accumulate()`.
        density: Float in (0, 1], or None for the share of the entries that
            replicas send in the step.
        codec: `Codec`, how the entries are written. Defaults to ternary values.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> rule = CompressedDownlink(error_accumulation.Accumulate(momentum=0.9))
    >>> rule.num_local, rule.has_momentum
    (2, True)

    Source: Sattler, Wiedemann, Mueller, Samek, "Robust and
    Communication-Efficient Federated Learning from Non-IID Data" (2019).
    """

    error_feedback: base.ErrorFeedback = dataclasses.field(
        default_factory=error_accumulation.Accumulate
    )
    density: float | None = None
    codec: codecs.Codec = dataclasses.field(
        default_factory=lambda: codecs.Codec(values="ternary")
    )

    def __post_init__(self) -> None:
        validation.check_instance(
            "error_feedback",
            self.error_feedback,
            base.ErrorFeedback,
            "Accumulate()",
        )
        if self.density is not None:
            self._check_number("density", "in (0, 1]", lambda d: 0 < d <= 1)
        validation.check_instance(
            "codec", self.codec, codecs.Codec, 'Codec(values="ternary")'
        )

    @property
    def has_momentum(self) -> bool:
        return self.error_feedback.has_momentum

    @property
    def needs_learning_rate(self) -> bool:
        return self.error_feedback.needs_learning_rate

    @property
    def residual_place(self) -> int | None:
        return self.error_feedback.residual_place

    @property
    def num_local(self) -> int:
        return self.error_feedback.num_local

    def initial_local(self, size: int, dtype: tf.DType) -> base.Tensors:
        return self.error_feedback.initial_local(size, dtype)

    def initial_shared(self, size: int, dtype: tf.DType) -> base.Tensors:
        inner = self.error_feedback.initial_shared(size, dtype)
        return (tf.zeros([size], dtype), *inner)

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        return self.error_feedback.accumulate(
            local, shared[1:], gradient, context
        )

    def update(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        return self.error_feedback.update(local, indices, sent, total, context)

    def add_error(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        return self.error_feedback.add_error(
            local, indices, error, total, context
        )

    def aggregate(
        self, shared: base.Tensors, total: tf.Tensor, context: base.StepContext
    ) -> tuple[tf.Tensor, base.Tensors]:
        total, inner = self.error_feedback.aggregate(shared[1:], total, context)
        a = shared[0] + total
        density = context.density if self.density is None else self.density
        k = selected.num_selected(density, a.shape[0])
        indices = selection.select_largest(
            a, [selection.Group(a.shape[0], k)], context.number
        )
        # Stochastic rounding draws other numbers than any replica does.
        stream = (context.number, tf.constant(context.num_replicas))
        payload = self.codec.payload(k, a.shape[0], a.dtype)
        _, sent = payload.encode(indices, selection.take(a, indices), stream)
        aggregate = equations.add_sent(tf.zeros_like(a), indices, sent)
        error = equations.residual_error(a, indices, sent)
        return aggregate, (error, *inner)

    def when_dense(self) -> base.ErrorFeedback:
        return self.error_feedback.when_dense()
