"""No error feedback."""

import dataclasses

import keras

from tf_regtopk.error_feedback import base


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class NoFeedback(base.ErrorFeedback):
    """What was not sent is forgotten: `a = g`.

    For unbiased codecs of whole gradients, and for comparison: a sparsifier
    without error feedback is biased.
    """

    num_local = 0

    def accumulate(self, local, shared, gradient, step):
        del shared, step
        return gradient, local

    def update(self, local, indices, sent, total, step):
        del indices, sent, total, step
        return local

    def when_dense(self):
        return self
