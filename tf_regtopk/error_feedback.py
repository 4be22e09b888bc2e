r"""Error feedback: what becomes of the gradient that was not sent.

Each rule is a few equations for one replica n of N, in which g is its gradient,
a what entries are selected from, and `sent` what the others receive of a:

    a, ...        = accumulate(state, g)        before anything is sent
    state         = update(state, a, sent)      once it was
    aggregate     = aggregate(shared, total)    total: the sum of all `sent`

Under `tf.distribute` Keras divides the loss by the number of replicas, so g
already carries the weight 1/N, and the sum over the replicas is the mean of
their gradients.
"""

import abc
import dataclasses
from typing import NamedTuple

import keras
import tensorflow as tf

from tf_regtopk import record


def accumulate(e, g):
    """The accumulated gradient `a = e + g`.

    Args:
        e: Float tensor `[J]`, this replica's residual error.
        g: Float tensor `[J]`, this replica's gradient.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> accumulate(tf.constant([1.0, 0.0]), tf.constant([0.5, 2.0])).numpy()
    array([1.5, 2. ], dtype=float32)
    """
    return e + g


def residual_error(a, indices, sent):
    """The residual error `e = a - sent`; exactly 0 where a was sent as it is.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.
        indices: int32 tensor `[k]`, the positions sent, each once.
        sent: Float tensor `[k]`, the values that the receivers see.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> a = tf.constant([1.5, 2.0, 3.0])
    >>> residual_error(a, tf.constant([2]), tf.constant([3.0])).numpy()
    array([1.5, 2. , 0. ], dtype=float32)
    """
    if indices.shape == a.shape:  # All were sent, in their order.
        return a - sent
    left = tf.gather(a, indices) - sent
    return tf.tensor_scatter_nd_update(a, indices[:, tf.newaxis], left)


def add_sent(h, indices, sent):
    """`h + sent`, with arguments as of `residual_error`."""
    if indices.shape == h.shape:
        return h + sent
    return tf.tensor_scatter_nd_add(h, indices[:, tf.newaxis], sent)


def clear_sent(u, indices):
    """`u`, but 0 where something was sent."""
    if indices.shape == u.shape:
        return tf.zeros_like(u)
    zeros = tf.zeros([indices.shape[0]], u.dtype)
    return tf.tensor_scatter_nd_update(u, indices[:, tf.newaxis], zeros)


class Moment(NamedTuple):
    """The facts of a step that are the same for all ways to exchange.

    Args:
        learning_rate: Scalar float tensor, the inner optimizer's.
        number: Scalar integer tensor, the number of steps taken before.
    """

    learning_rate: tf.Tensor
    number: tf.Tensor


class Step(NamedTuple):
    """What a rule may want to know of a step.

    Args:
        num_replicas: N.
        density: k / J.
        learning_rate: Scalar float tensor, the inner optimizer's; only for
            rules with `needs_learning_rate`.
        number: Scalar integer tensor, the number of steps taken before.
    """

    num_replicas: int
    density: float
    learning_rate: tf.Tensor
    number: tf.Tensor


@dataclasses.dataclass(frozen=True)
class ErrorFeedback(record.Record, abc.ABC):
    """Base class: a rule of error feedback.

    A subclass is a frozen dataclass of hyper-parameters. To be saved with a
    model it is registered with `keras.saving.register_keras_serializable`.

    Its state are `num_local` tensors `[J]` that start as zeros, of which each
    replica has its own, and the tensors of `initial_shared`, which are the same
    on all. If the number of replicas changes, the sums over the replicas of the
    local ones are kept and spread evenly.
    """

    # Whether the rule reads `Step.learning_rate`.
    needs_learning_rate = False

    @property
    @abc.abstractmethod
    def num_local(self):
        """Number of tensors that each replica has for itself."""

    def initial_local(self, size, dtype):
        """The local tensors before the first step, as `initial_shared`."""
        return (tf.zeros([size], dtype),) * self.num_local

    def initial_shared(self, size, dtype):
        """The shared tensors before the first step.

        Args:
            size: J.
            dtype: Float dtype of the gradient.

        Returns:
            Tuple of tensors.
        """
        del size, dtype
        return ()

    @abc.abstractmethod
    def accumulate(self, local, shared, gradient, step):
        """What entries are selected from.

        Args:
            local: Tuple of `num_local` tensors `[J]`.
            shared: Tuple of tensors, as of `initial_shared`.
            gradient: Tensor `[J]`, this replica's g.
            step: `Step`.

        Returns:
            `(a, local)`: a, and the tuple of the local tensors: a itself where
            a rule keeps a until it is known what was sent, and the same object
            where one stays as it is.
        """

    @abc.abstractmethod
    def update(self, local, indices, sent, step):
        """The local tensors for the next step.

        Args:
            local: As returned by `accumulate`.
            indices: int32 tensor `[k]`, the entries sent, each once.
            sent: Tensor `[k]`, the values that the receivers see.
            step: `Step`.

        Returns:
            Tuple of tensors `[J]`, the same object where one stays as it is.
        """

    def aggregate(self, shared, total, step):
        """What the inner optimizer sees.

        Args:
            shared: Tuple of tensors, as of `initial_shared`.
            total: Tensor `[J]`, the sum of what all replicas sent.
            step: `Step`.

        Returns:
            `(aggregate, shared)`.
        """
        del step
        return total, shared

    def when_dense(self):
        """What the rule comes to if no entry has to be held back.

        Returns:
            `ErrorFeedback` without local tensors, for `exchange="dense"`.

        Raises:
            ValueError: If the rule does not say.
        """
        raise ValueError(
            '`exchange` must be "sparse" with a rule of error feedback that '
            f"has no `when_dense`. Received: error_feedback={self}"
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class NoFeedback(ErrorFeedback):
    """What was not sent is forgotten: `a = g`.

    For unbiased codecs of whole gradients, and for comparison: a sparsifier
    without error feedback is biased.
    """

    num_local = 0

    def accumulate(self, local, shared, gradient, step):
        del shared, step
        return gradient, local

    def update(self, local, indices, sent, step):
        del indices, sent, step
        return local

    def when_dense(self):
        return self


@dataclasses.dataclass(frozen=True)
class MomentumOfSum(ErrorFeedback):
    """What rules with local momentum come to if every entry is sent.

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

    def initial_shared(self, size, dtype):
        return (tf.zeros([size], dtype),) if self.momentum else ()

    def accumulate(self, local, shared, gradient, step):
        del shared
        if self.clip_norm is not None:
            gradient = clip(gradient, self.clip_norm / step.num_replicas**0.5)
        return gradient, local

    def update(self, local, indices, sent, step):
        del indices, sent, step
        return local

    def aggregate(self, shared, total, step):
        del step
        if not self.momentum:
            return total, shared
        u = self.momentum * shared[0] + self.scale * total
        return u, (u,)


def momentum_of_sum(momentum, scale=1.0, clip_norm=None):
    """`MomentumOfSum`, or what there is without one."""
    if not momentum and clip_norm is None:
        return NoFeedback()
    return MomentumOfSum(momentum, scale, clip_norm)


def clip(gradient, norm):
    """`gradient`, scaled down to at most this Euclidean norm."""
    # The squares of what is not scaled may be too large for a float.
    largest = tf.reduce_max(tf.abs(gradient))
    scaled = tf.math.divide_no_nan(gradient, largest)
    ratio = tf.math.divide_no_nan(norm / tf.norm(scaled), largest)
    return tf.where(ratio < 1, gradient * ratio, gradient)
