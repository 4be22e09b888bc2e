"""Keras training that sends only the gradient entries worth sending."""

from tf_regtopk.loss_scale import LossScaleOptimizer
from tf_regtopk.optimizer import SparsifiedOptimizer
from tf_regtopk.sparsifiers import RandomK
from tf_regtopk.sparsifiers import RegTopK
from tf_regtopk.sparsifiers import Sparsifier
from tf_regtopk.sparsifiers import TopK
from tf_regtopk.strategy import MultiWorkerMirroredStrategy
from tf_regtopk.version import __version__

__all__ = [
    "LossScaleOptimizer",
    "MultiWorkerMirroredStrategy",
    "RandomK",
    "RegTopK",
    "SparsifiedOptimizer",
    "Sparsifier",
    "TopK",
    "__version__",
]
