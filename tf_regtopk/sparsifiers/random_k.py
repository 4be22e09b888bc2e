"""Random-k."""

import dataclasses

import keras
import tensorflow as tf

from tf_regtopk.kernels import hashing
from tf_regtopk.sparsifiers import base


def random_k_score(
    size: int, seed: int, step: int | tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    r"""Draws Random-k's scores, uniform in [0, 1), the same on every replica.

    Args:
        size: J, the number of entries.
        seed: Any integer.
        step: Scalar integer.
        dtype: Float dtype of the scores.

    Returns:
        Float tensor `[J]`.
    """
    return hashing.uniform(size, seed, step, dtype=dtype)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class RandomK(base.Sparsifier):
    """Random-k: the same k entries on every replica, fresh every step.

    Args:
        density: Float in (0, 1], or None. The share of entries that is sent.
            None is 0.1 %, but at least 1,000 entries.
        seed: Non-negative integer. Runs with one seed select the same entries.
            A value codec that rounds at random needs another seed.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> RandomK(density=0.01).num_selected(1000)
    10

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("seed", minimum=0)

    def score(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, ...], step: tf.Tensor
    ) -> tf.Tensor:
        del memory
        return random_k_score(a.shape[0], self.seed, step, a.dtype)
