"""Keras training that sends only the gradient entries worth sending."""

from tf_regtopk.backup import Backup
from tf_regtopk.backup import load_scope
from tf_regtopk.loss_scale import LossScaleOptimizer
from tf_regtopk.optimizer import SparsifiedOptimizer
from tf_regtopk.sparsifiers import RandomK
from tf_regtopk.sparsifiers import RegTopK
from tf_regtopk.sparsifiers import Sparsifier
from tf_regtopk.sparsifiers import TopK
from tf_regtopk.strategy import MultiWorkerMirroredStrategy
from tf_regtopk.version import __version__
from tf_regtopk.worker_files import worker_path

__all__ = [
    "Backup",
    "LossScaleOptimizer",
    "MultiWorkerMirroredStrategy",
    "RandomK",
    "RegTopK",
    "SparsifiedOptimizer",
    "Sparsifier",
    "TopK",
    "__version__",
    "load_scope",
    "worker_path",
]
