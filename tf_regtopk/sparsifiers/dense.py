"""The sparsifier that selects all entries."""

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk.sparsifiers import base
from tf_regtopk.sparsifiers import top_k


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Dense(base.Sparsifier):
    """All entries, for value codecs that quantise whole gradients.

    QSGD, natural compression and CGX are such codecs. Every replica receives
    the payloads of all others, so the bytes grow with the number of replicas.

    Example:

    >>> Dense().num_selected(1000)
    1000
    """

    selects_non_finite: ClassVar[bool] = True

    density: float | None = 1.0

    def __post_init__(self) -> None:
        self._check_number("density", "1 for `Dense`", lambda d: d == 1)

    def score(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, ...], step: tf.Tensor
    ) -> tf.Tensor:
        del memory, step
        return top_k.top_k_score(a)
