"""RegTop-k."""

import dataclasses
import math
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.sparsifiers import base


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


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class RegTopK(base.Sparsifier):
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
    measured: ClassVar[tuple[str, ...]] = ("damped", "selected_again")

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

    def initial_memory(self, k, size, dtype):
        del size
        # NaN: nothing was sent, so Delta is not defined there.
        return tf.range(k), tf.fill([k], tf.constant(math.nan, dtype))

    def score(self, a, memory, step):
        del step
        indices, _ = memory
        one_plus_delta = self._one_plus_delta(a, memory)
        return reg_top_k_score(a, indices, one_plus_delta, self.mu, self.q)

    def _one_plus_delta(self, a, memory):
        """1 + Delta at the entries sent at t-1, NaN where not defined."""
        indices, one_plus_delta = memory
        if self.denominator == "current":
            difference = one_plus_delta
            one_plus_delta = 1.0 + difference / tf.gather(a, indices)
        return one_plus_delta

    def restore(self, a, scores, memory, selected):
        indices, _ = memory
        original = tf.gather(a, indices)
        # Positions are never negative, so this adds 0. XLA does not know, and
        # cannot write over the scores before `selected` has been found.
        indices += tf.minimum(selected[0], 0)
        return tf.tensor_scatter_nd_update(
            scores, indices[:, tf.newaxis], original
        )

    def measure(self, a, memory, indices):
        """Returns two numbers of the entries that were sent at t-1.

        Damped are those with |1 + Delta| < 1/2, of which the others cancelled
        more than half; selected again are those in `indices`.
        """
        before, _ = memory
        is_damped = tf.abs(self._one_plus_delta(a, memory)) < 0.5
        mask = tf.scatter_nd(
            indices[:, tf.newaxis], tf.ones_like(indices), [a.shape[0]]
        )
        damped = tf.reduce_sum(tf.cast(is_damped, tf.int32))
        is_first = tf.reduce_all(tf.math.is_nan(memory[1]))
        again = tf.reduce_sum(tf.gather(mask, before))
        # Before the first step the memory holds no entries that were sent.
        return damped, tf.where(is_first, 0, again)

    def remember(self, memory, indices, sent, aggregate, step):
        del memory, step
        if self.denominator == "current":
            # The denominator follows in the next step.
            return indices, aggregate - sent
        not_defined = tf.constant(math.nan, sent.dtype)
        return indices, tf.where(sent == 0, not_defined, aggregate / sent)
