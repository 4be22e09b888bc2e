"""Top-k."""

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk.sparsifiers import base


def top_k_score(a: tf.Tensor) -> tf.Tensor:
    """Returns Top-k's scores: `score_j = a_j`.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.

    Returns:
        Float tensor `[J]`.
    """
    return a


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class TopK(base.Sparsifier):
    """Top-k: the k entries of the largest magnitude.

    Args:
        density: Float in (0, 1], or None. The share of entries that is sent.
            None is 0.1 %, but at least 1,000 entries.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> TopK(density=0.01).num_selected(1000)
    10

    Source: Aji, Heafield, "Sparse Communication for Distributed Gradient
    Descent" (2017).
    """

    selects_non_finite: ClassVar[bool] = True

    def score(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, ...], step: tf.Tensor
    ) -> tf.Tensor:
        del memory, step
        return top_k_score(a)
