"""Error feedback: what was not sent is remembered and sent later.

    a_n^t     = e_n^t + g_n^t          (accumulate)
    e_n^{t+1} = a_n^t - sent_n^t       (residual_error)

Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018).
"""

import abc
import dataclasses

import keras
import tensorflow as tf


def accumulate(error, gradient):
    """The accumulated gradient `a = e + g`.

    Args:
        error: Float tensor `[J]`, this replica's residual error e.
        gradient: Float tensor `[J]`, this replica's gradient g.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> accumulate(tf.constant([1.0, 0.0]), tf.constant([0.5, 2.0])).numpy()
    array([1.5, 2. ], dtype=float32)
    """
    return error + gradient


def residual_error(accumulated, indices, sent):
    """The residual error `e = a - sent`; exactly 0 where a was sent as it is.

    Args:
        accumulated: Float tensor `[J]`, the accumulated gradient a.
        indices: int32 tensor `[k]`, the positions sent, each once.
        sent: Float tensor `[k]`, the values that the receivers see.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> a = tf.constant([1.5, 2.0, 3.0])
    >>> residual_error(a, tf.constant([2]), tf.constant([3.0])).numpy()
    array([1.5, 2. , 0. ], dtype=float32)
    """
    if indices.shape == accumulated.shape:  # All were sent, in their order.
        return accumulated - sent
    left = tf.gather(accumulated, indices) - sent
    return tf.tensor_scatter_nd_update(
        accumulated, indices[:, tf.newaxis], left
    )


class ErrorFeedback(abc.ABC):
    """Base class: what becomes of the entries that are not sent.

    A subclass is a frozen dataclass of hyper-parameters. To be saved with a
    model it is registered with `keras.saving.register_keras_serializable`.
    """

    @abc.abstractmethod
    def accumulate(self, error, gradient):
        """What the entries to send are selected from, as `accumulate`."""

    @abc.abstractmethod
    def residual_error(self, accumulated, indices, sent):
        """The error for the next step, as `residual_error`."""

    def get_config(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Accumulate(ErrorFeedback):
    """Error accumulation: what was not sent is added to the next gradient."""

    def accumulate(self, error, gradient):
        return accumulate(error, gradient)

    def residual_error(self, accumulated, indices, sent):
        return residual_error(accumulated, indices, sent)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class NoFeedback(ErrorFeedback):
    """What was not sent is forgotten.

    For unbiased codecs of whole gradients, and for comparison: a sparsifier
    without error feedback is biased.
    """

    def accumulate(self, error, gradient):
        del error
        return gradient

    def residual_error(self, accumulated, indices, sent):
        del indices, sent
        return tf.zeros_like(accumulated)
