"""No error feedback."""

import dataclasses

import keras
import tensorflow as tf

from tf_regtopk.error_feedback import base


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class NoFeedback(base.ErrorFeedback):
    """No error feedback: entries that are not sent are forgotten, `a = g`.

    For unbiased codecs of whole gradients, and for comparison: a sparsifier
    without error feedback is biased.

    Example:

    >>> NoFeedback().num_local
    0
    """

    num_local = 0

    def accumulate(
        self,
        local: base.Tensors,
        shared: base.Tensors,
        gradient: tf.Tensor,
        context: base.StepContext,
    ) -> tuple[tf.Tensor, base.Tensors]:
        del shared, context
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

    def add_error(
        self,
        local: base.Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: base.StepContext,
    ) -> base.Tensors:
        del indices, error, total, context
        return local

    def when_dense(self) -> base.ErrorFeedback:
        return self
