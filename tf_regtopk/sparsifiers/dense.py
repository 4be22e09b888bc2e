"""All entries."""

import dataclasses
from typing import ClassVar

import keras

from tf_regtopk.sparsifiers import base
from tf_regtopk.sparsifiers import top_k


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Dense(base.Sparsifier):
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
        return top_k.top_k_score(a)
