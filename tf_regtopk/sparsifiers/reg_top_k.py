"""RegTop-k."""

from collections.abc import Sequence
import dataclasses
import math
from typing import ClassVar
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.sparsifiers import base


def reg_top_k_score(
    a: tf.Tensor,
    indices: tf.Tensor,
    one_plus_delta: tf.Tensor,
    mu: float,
    q: float,
) -> tf.Tensor:
    r"""Damps the entries that the other replicas cancelled before.

        score_j = a_j tanh(|1 + Delta_j| / mu) / tanh(|1 + Q| / mu)
        Delta_j = (agg_j^{t-1} - sent_j^{t-1}) / denominator_j
                                                where j was sent at t-1
        Delta_j = Q                             elsewhere

    With the denominator `sent_j^{t-1}`, 1 + Delta_j is the sum over all
    replicas in units of the value that this replica sent: 0 where the others
    cancelled it. The paper's score lacks the division by tanh(|1 + Q| / mu).
    The division changes no order, and makes the scores of all entries but
    `indices` equal to a.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.
        indices: int32 tensor `[k]`, the entries sent at t-1, each once.
        one_plus_delta: Float tensor `[k]`, 1 + Delta at `indices`; NaN where
            Delta is not defined, which counts as not sent.
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
    """RegTop-k: Top-k that holds back entries which other replicas cancel.

    Args:
        density: Float in (0, 1], or None. The share of entries that is sent.
            None is 0.1 %, but at least 1,000 entries.
        mu: Positive float, at most 1e30. The larger, the stronger the damping
            of entries of which little remained in the sum over all replicas;
            with mu -> 0 this is Top-k. In the distributed linear regression 2
            to 20 work alike, and 0.5 or less stalls as Top-k does.
        q: Non-negative float. Replaces Delta of an entry that was not sent in
            the previous step; large, because such an entry is not to be damped.
        denominator: `"previous"` divides by the value that this replica sent in
            the previous step, `"current"` by the value accumulated now. Both
            are published; only `"previous"` reaches the optimum where Top-k
            stalls.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

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
    denominator: Literal["previous", "current"] = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        # The limits are those of float32, in which a smaller mu and what is
        # divided by a larger one would be 0.
        self._check_number(
            "mu",
            "from 1e-37 to 1e30",
            lambda mu: 1e-37 <= mu <= 1e30,
        )
        self._check_number("q", "a non-negative number", lambda q: q >= 0)
        validation.check_choice(
            "denominator", self.denominator, ("previous", "current")
        )

    def initial_memory(
        self, k: int, size: int, dtype: tf.DType
    ) -> tuple[tf.Tensor, tf.Tensor]:
        del size
        # Delta is NaN, that is not defined, because nothing has been sent yet.
        return tf.range(k), tf.fill([k], tf.constant(math.nan, dtype))

    def is_valid_memory(self, memory: Sequence[np.ndarray], size: int) -> bool:
        indices, _ = memory
        return bool(np.all((indices >= 0) & (indices < size)))

    def score(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, tf.Tensor], step: tf.Tensor
    ) -> tf.Tensor:
        del step
        indices, _ = memory
        one_plus_delta = self._one_plus_delta(a, memory)
        return reg_top_k_score(a, indices, one_plus_delta, self.mu, self.q)

    def _one_plus_delta(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, tf.Tensor]
    ) -> tf.Tensor:
        """Computes 1 + Delta of the entries sent at t-1, NaN if not defined."""
        indices, one_plus_delta = memory
        if self.denominator == "current":
            difference = one_plus_delta
            one_plus_delta = 1.0 + difference / tf.gather(a, indices)
        return one_plus_delta

    def restore(
        self,
        a: tf.Tensor,
        scores: tf.Tensor,
        memory: tuple[tf.Tensor, tf.Tensor],
        selected: tf.Tensor,
    ) -> tf.Tensor:
        indices, _ = memory
        original = tf.gather(a, indices)
        # This adds 0, because positions are never negative. XLA does not know
        # that, and cannot write over the scores before `selected` is found.
        indices += tf.minimum(selected[0], 0)
        return tf.tensor_scatter_nd_update(
            scores, indices[:, tf.newaxis], original
        )

    def measure(
        self,
        a: tf.Tensor,
        memory: tuple[tf.Tensor, tf.Tensor],
        indices: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Counts the damped and the selected entries of those sent at t-1.

        An entry with |1 + Delta| < 1/2 counts as damped, because the others
        cancelled more than half of it; an entry of `indices` counts as selected
        again.
        """
        before, _ = memory
        is_damped = tf.abs(self._one_plus_delta(a, memory)) < 0.5
        mask = tf.scatter_nd(
            indices[:, tf.newaxis], tf.ones_like(indices), [a.shape[0]]
        )
        damped = tf.reduce_sum(tf.cast(is_damped, tf.int32))
        is_first = tf.reduce_all(tf.math.is_nan(memory[1]))
        again = tf.reduce_sum(tf.gather(mask, before))
        # Nothing is selected again in the first step, because its memory holds
        # no entries that were sent.
        return damped, tf.where(is_first, 0, again)

    def remember(
        self,
        memory: tuple[tf.Tensor, tf.Tensor],
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        del memory, step
        # With the current denominator the difference is remembered, because the
        # denominator follows in the next step.
        is_current = self.denominator == "current"
        found = total - sent if is_current else total / sent
        not_defined = tf.constant(math.nan, sent.dtype)
        return indices, tf.where(sent == 0, not_defined, found)
