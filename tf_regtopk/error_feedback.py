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
from tf_regtopk import validation


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

    # Whether a replaces the first local tensor until it is known what was sent.
    keeps_a = False
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
            `(a, local)`: a, and the tuple of the local tensors, of which those
            that stay as they are may be None. With `keeps_a` the first is to be
            None: a itself takes its place.
        """

    @abc.abstractmethod
    def update(self, local, indices, sent, step):
        """The local tensors for the next step.

        Args:
            local: As returned by `accumulate`, but none of them None.
            indices: int32 tensor `[k]`, the entries sent, each once.
            sent: Tensor `[k]`, the values that the receivers see.
            step: `Step`.

        Returns:
            Tuple of tensors `[J]`, None where one stays as it is.
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
class Accumulate(ErrorFeedback):
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

    Example:

    >>> dgc = Accumulate(momentum=0.9, factor_masking=True)

    Sources: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018); Lin
    et al., "Deep Gradient Compression" (2018).
    """

    momentum: float = 0.0
    factor_masking: bool = False
    clip_norm: float | None = None
    follow_learning_rate: bool = False

    keeps_a = True

    def __post_init__(self):
        self._check_number("momentum", "in [0, 1)", lambda m: 0 <= m < 1)
        validation.check_boolean("factor_masking", self.factor_masking)
        if self.factor_masking and not self.momentum:
            raise ValueError(
                "`factor_masking` must go with `momentum`, which it masks. "
                "Received: factor_masking=True, momentum=0"
            )
        validation.check_boolean(
            "follow_learning_rate", self.follow_learning_rate
        )
        if self.clip_norm is not None:
            self._check_number("clip_norm", "positive", lambda c: c > 0)

    @property
    def num_local(self):
        return 2 if self.momentum else 1

    @property
    def needs_learning_rate(self):
        return self.follow_learning_rate

    def initial_shared(self, size, dtype):
        del size
        return (tf.zeros([], dtype),) if self.follow_learning_rate else ()

    def accumulate(self, local, shared, gradient, step):
        if self.clip_norm is not None:
            gradient = _clip(gradient, self.clip_norm / step.num_replicas**0.5)
        e, *u = local
        if self.follow_learning_rate:
            e *= _ratio(shared[0], tf.cast(step.learning_rate, e.dtype))
        if not self.momentum:
            return accumulate(e, gradient), (None,)
        u = self.momentum * u[0] + gradient
        return accumulate(e, u), (None, u)

    def update(self, local, indices, sent, step):
        del step
        e = residual_error(local[0], indices, sent)
        if not self.momentum:
            return (e,)
        if not self.factor_masking:
            return e, None
        return e, clear_sent(local[1], indices)

    def aggregate(self, shared, total, step):
        if self.follow_learning_rate:
            shared = (tf.cast(step.learning_rate, total.dtype),)
        return total, shared

    def when_dense(self):
        # Factor masking is for what was held back.
        return _of_sum(self.momentum, clip_norm=self.clip_norm)


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


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class EF21(ErrorFeedback):
    r"""EF21: the replicas send what changes in their gradients.

        a = v - h,          h = h + sent,           v = (1 - eta) v + eta g
        aggregate = H = H + total                   H: the sum of all h

    With eta = 1, v is g itself; with less this is EF21-SGDM, for stochastic
    gradients. What was not sent is in the next difference again.

    Args:
        momentum: Float eta in (0, 1].

    Sources: Richtarik, Sokolov, Fatkhullin, "EF21" (2021); Fatkhullin,
    Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!" (2023).
    """

    momentum: float = 1.0

    def __post_init__(self):
        self._check_number("momentum", "in (0, 1]", lambda m: 0 < m <= 1)

    @property
    def num_local(self):
        return 1 if self.momentum == 1 else 2

    def initial_shared(self, size, dtype):
        return (tf.zeros([size], dtype),)

    def accumulate(self, local, shared, gradient, step):
        del shared, step
        if self.momentum == 1:
            [h] = local
            return gradient - h, (None,)
        h, v = local
        v = (1 - self.momentum) * v + self.momentum * gradient
        return v - h, (None, v)

    def update(self, local, indices, sent, step):
        del step
        h = add_sent(local[0], indices, sent)
        return (h, *(None for _ in local[1:]))

    def aggregate(self, shared, total, step):
        del step
        [h_sum] = shared
        h_sum += total
        return h_sum, (h_sum,)

    def when_dense(self):
        return _of_sum(1 - self.momentum, scale=self.momentum)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class LearnedShift(ErrorFeedback):
    r"""Error accumulation around a slowly learned shift h of the gradient.

        a = e + g - h,      e = a - sent,           h = h + rate sent
        aggregate = H + total,                      H = H + rate total

    H is the sum of all h. At a fixed point h is the local gradient, so that
    what is left to send goes to zero. The aggregates of all steps and the
    errors add up to all gradients: nothing is lost. With local momentum m, for
    which the inner optimizer is plain SGD:

        u = m u + g - h,    a = e + u,              e = a - sent
        p = m p + H,        aggregate = total + p
        h = h + rate (1 - m) sent,                  H alike

    It keeps e and h, and the shared H; with momentum u and p as well.

    Args:
        rate: Float in (0, 1], or None for the density. In the distributed
            linear regression a quarter of the density learns too slowly, and
            four times the density diverges.
        momentum: Float m in [0, 1).

    A relative of EC-SGD-DIANA (Gorbunov et al., 2020), which learns the shift
    from a second message.
    """

    rate: float | None = None
    momentum: float = 0.0

    keeps_a = True

    def __post_init__(self):
        if self.rate is not None:
            self._check_number("rate", "in (0, 1]", lambda r: 0 < r <= 1)
        self._check_number("momentum", "in [0, 1)", lambda m: 0 <= m < 1)

    @property
    def num_local(self):
        return 3 if self.momentum else 2

    def initial_shared(self, size, dtype):
        return (tf.zeros([size], dtype),) * (2 if self.momentum else 1)

    def accumulate(self, local, shared, gradient, step):
        del shared, step
        if not self.momentum:
            e, h = local
            return e + (gradient - h), (None, None)
        e, h, u = local
        u = self.momentum * u + (gradient - h)
        return e + u, (None, None, u)

    def update(self, local, indices, sent, step):
        a, h, *u = local
        e = residual_error(a, indices, sent)
        h = add_sent(h, indices, self._rate(step) * sent)
        return (e, h, *(None for _ in u))

    def aggregate(self, shared, total, step):
        h_sum = shared[0] + self._rate(step) * total
        if not self.momentum:
            return shared[0] + total, (h_sum,)
        p = self.momentum * shared[1] + shared[0]
        return total + p, (h_sum, p)

    def when_dense(self):
        return _of_sum(self.momentum)

    def _rate(self, step):
        rate = step.density if self.rate is None else self.rate
        return rate * (1 - self.momentum)


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
            gradient = _clip(gradient, self.clip_norm / step.num_replicas**0.5)
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


def _of_sum(momentum, scale=1.0, clip_norm=None):
    if not momentum and clip_norm is None:
        return NoFeedback()
    return MomentumOfSum(momentum, scale, clip_norm)


def _clip(gradient, norm):
    """`gradient`, scaled down to at most this Euclidean norm."""
    # The squares of what is not scaled may be too large for a float.
    largest = tf.reduce_max(tf.abs(gradient))
    scaled = tf.math.divide_no_nan(gradient, largest)
    ratio = tf.math.divide_no_nan(norm / tf.norm(scaled), largest)
    return tf.where(ratio < 1, gradient * ratio, gradient)


def _ratio(previous, current):
    """`previous / current`, 1 where either is 0."""
    is_defined = (previous > 0) & (current > 0)
    one = tf.ones_like(current)
    return tf.where(
        is_defined, previous / tf.where(is_defined, current, one), one
    )
