"""Sparsifiers: which k entries of the accumulated gradient a replica sends.

A sparsifier is a pair: a pure score function in the notation of its paper, and
a small immutable record of its hyper-parameters.  Each step a replica sends
the k entries whose scores have the largest magnitude.

Notation, for one replica: a the accumulated gradient, `sent` what the replica
sent of it, agg the sum over all replicas of what they sent; a superscript t-1
marks the previous step.  Under `tf.distribute` Keras divides the loss by the
number of replicas, so a already carries the weight 1/N of its replica.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk import hashing
from tf_regtopk import record
from tf_regtopk import validation


def top_k_score(a):
    """Top-k: `score_j = a_j`.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.

    Returns:
        Float tensor `[J]`.
    """
    return a


def reg_top_k_score(a, indices, one_plus_delta, mu, q):
    r"""RegTop-k: the entry, damped where the others cancelled it before.

        score_j = a_j tanh(|1 + Delta_j| / mu) / tanh(|1 + Q| / mu)
        Delta_j = (agg_j^{t-1} - sent_j^{t-1}) / denominator_j
                                                where j was sent at t-1
        Delta_j = Q                             elsewhere

    With the denominator `sent_j^{t-1}`, 1 + Delta_j is what all replicas sent
    for the entry in units of what this one sent: 0 where they cancelled it. The
    paper's score lacks the division, which changes no order and leaves the
    scores of all entries but `indices` to be a itself.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.
        indices: int32 tensor `[k]`, the entries sent at t-1, each once.
        one_plus_delta: Float tensor `[k]`, 1 + Delta at `indices`; NaN where
            it is not defined, which counts as not sent.
        mu: Positive float. The larger, the stronger the damping; with mu -> 0
            this is Top-k.
        q: Non-negative float Q.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> a = tf.constant([3.0, -2.0, 1.0])
    >>> indices = tf.constant([0])  # sent, and cancelled by the others
    >>> reg_top_k_score(a, indices, tf.constant([0.0]), mu=4.0, q=1e8).numpy()
    array([ 0., -2.,  1.], dtype=float32)

    Source: Bereyhi, Liang, Boudreau, Afana, "Regularized Top-k: A Bayesian
    Framework for Gradient Sparsification".
    """
    undamped = tf.constant(math.tanh(abs(1.0 + q) / mu), a.dtype)
    damping = tf.where(
        tf.math.is_nan(one_plus_delta),
        tf.ones_like(one_plus_delta),
        tf.tanh(tf.abs(one_plus_delta) / mu) / undamped,
    )
    return tf.tensor_scatter_nd_update(
        a, indices[:, tf.newaxis], tf.gather(a, indices) * damping
    )


def random_k_score(size, seed, step, dtype):
    r"""Random-k: uniform in [0, 1), and the same on every replica.

    Args:
        size: J, the number of entries.
        seed: Python integer.
        step: Scalar integer tensor.
        dtype: Float dtype of the scores.

    Returns:
        Float tensor `[J]`.
    """
    return hashing.uniform(size, seed, step, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Sparsifier(record.Record, abc.ABC):
    """Base class: what the optimizer asks of a sparsifier.

    A subclass is a frozen dataclass of hyper-parameters that overrides `score`,
    and the two memory methods where it remembers something between steps. To be
    saved with a model it is registered with
    `keras.saving.register_keras_serializable`.

    Args:
        density: Float in (0, 1]. The share of entries that is sent.
    """

    # Whether entries that are NaN or infinite are always selected first. If
    # not, the optimizer has to look for them among all.
    selects_non_finite: ClassVar[bool] = False

    density: float = 0.001

    def __post_init__(self):
        self._check_number("density", "in (0, 1]", lambda d: 0 < d <= 1)

    def num_selected(self, num_entries):
        """k = max(1, round(density * J)) for J = `num_entries`."""
        return max(1, round(self.density * num_entries))

    def initial_memory(self, k, dtype):
        """What is remembered before the first step.

        Args:
            k: Number of entries sent each step.
            dtype: Float dtype of the gradient.

        Returns:
            Tuple of tensors, `()` if nothing is remembered.
        """
        del k, dtype
        return ()

    @abc.abstractmethod
    def score(self, a, memory, step):
        """The scores, of which the largest are selected.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            memory: Tuple of tensors from `initial_memory` or `remember`.
            step: Scalar int64 tensor, the number of steps taken so far.

        Returns:
            Float tensor `[J]`. Those of largest magnitude are selected.
        """

    def restore(self, a, scores, memory, selected):
        """Returns `a`, for a sparsifier that wrote its scores over it.

        If few scores differ from a, XLA stores them in the place of a, as long
        as nothing needs a afterwards; else it copies all of a first. A
        sparsifier can spare it that by overriding this method, to make a out of
        `scores` again.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            scores: Float tensor `[J]`, what `score` has returned for it.
            memory: As for `score`.
            selected: int32 tensor, what was selected by these scores.

        Returns:
            Float tensor `[J]`, equal to `a`.
        """
        del scores, memory, selected
        return a

    def remember(self, indices, sent, aggregate):
        """What to remember of a step for the next one.

        Args:
            indices: int32 tensor `[k]`, the entries this replica sent.
            sent: Float tensor `[k]`, the values it sent.
            aggregate: Float tensor `[k]`, the sum of what all replicas sent for
                these entries.

        Returns:
            Tuple of tensors of the shapes and dtypes of `initial_memory`.
        """
        del indices, sent, aggregate
        return ()


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class TopK(Sparsifier):
    """Top-k: the k entries of the largest magnitude.

    Args:
        density: Float in (0, 1]. The share of entries that is sent.

    Example:

    >>> TopK(density=0.01).num_selected(1000)
    10

    Source: Aji, Heafield, "Sparse Communication for Distributed Gradient
    Descent" (2017).
    """

    selects_non_finite: ClassVar[bool] = True

    def score(self, a, memory, step):
        del memory, step
        return top_k_score(a)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class RegTopK(Sparsifier):
    """RegTop-k: Top-k that holds back entries which the others cancel.

    Args:
        density: Float in (0, 1]. The share of entries that is sent.
        mu: Positive float. The larger, the stronger entries are damped of which
            little remained in the sum of all replicas; with mu -> 0 this is
            Top-k. In the distributed linear regression 2 to 20 work alike, and
            0.5 or less stalls as Top-k does.
        q: Non-negative float. Stands for Delta where an entry was not sent in
            the previous step; large, so that such an entry is not damped.
        denominator: `"previous"` divides by what this replica sent in the
            previous step, `"current"` by what it has accumulated now. Both are
            published; only the first reaches the optimum where Top-k stalls.

    Example:

    >>> RegTopK(density=0.01, mu=5.0)
    RegTopK(density=0.01, mu=5.0, q=100000000.0, denominator='previous')

    Source: Bereyhi, Liang, Boudreau, Afana, "Regularized Top-k: A Bayesian
    Framework for Gradient Sparsification".
    """

    selects_non_finite: ClassVar[bool] = True

    mu: float = 4.0
    q: float = 1e8
    denominator: str = "previous"

    def __post_init__(self):
        super().__post_init__()
        # A smaller mu would be 0 in float32.
        self._check_number("mu", "a positive number", lambda mu: mu > 1e-37)
        self._check_number("q", "a non-negative number", lambda q: q >= 0)
        validation.check_choice(
            "denominator", self.denominator, ("previous", "current")
        )

    def initial_memory(self, k, dtype):
        # NaN: nothing was sent, so Delta is not defined there.
        return tf.range(k), tf.fill([k], tf.constant(math.nan, dtype))

    def score(self, a, memory, step):
        del step
        indices, one_plus_delta = memory
        if self.denominator == "current":
            difference = one_plus_delta
            one_plus_delta = 1.0 + difference / tf.gather(a, indices)
        return reg_top_k_score(a, indices, one_plus_delta, self.mu, self.q)

    def restore(self, a, scores, memory, selected):
        indices, _ = memory
        original = tf.gather(a, indices)
        # Positions are never negative, so this adds 0. XLA does not know, and
        # cannot write over the scores before `selected` has been found.
        indices += tf.minimum(selected[0], 0)
        return tf.tensor_scatter_nd_update(
            scores, indices[:, tf.newaxis], original
        )

    def remember(self, indices, sent, aggregate):
        if self.denominator == "current":
            # The denominator follows in the next step.
            return indices, aggregate - sent
        not_defined = tf.constant(math.nan, sent.dtype)
        return indices, tf.where(sent == 0, not_defined, aggregate / sent)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class RandomK(Sparsifier):
    """Random-k: the same k entries on every replica, fresh every step.

    Args:
        density: Float in (0, 1]. The share of entries that is sent.
        seed: Non-negative integer. Runs with one seed select the same entries.

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018).
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_integer("seed", minimum=0)

    def score(self, a, memory, step):
        del memory
        return random_k_score(a.shape[0], self.seed, step, a.dtype)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Dense(Sparsifier):
    """All entries, for codecs that quantise whole gradients.

    As in QSGD, natural compression or CGX. Every replica receives the payloads
    of all others, so this takes bytes in proportion to their number.

    Example:

    >>> Dense().num_selected(1000)
    1000
    """

    selects_non_finite: ClassVar[bool] = True

    density: float = 1.0

    def __post_init__(self):
        self._check_number("density", "1 for `Dense`", lambda d: d == 1)

    def score(self, a, memory, step):
        del memory, step
        return top_k_score(a)
