"""Keras training that sends only the gradient entries worth sending."""

from tf_regtopk.backup import Backup
from tf_regtopk.backup import load_scope
from tf_regtopk.codec import Codec
from tf_regtopk.downlink import CompressedDownlink
from tf_regtopk.ef21 import EF21
from tf_regtopk.error_accumulation import Accumulate
from tf_regtopk.error_feedback import ErrorFeedback
from tf_regtopk.error_feedback import NoFeedback
from tf_regtopk.learned_shift import LearnedShift
from tf_regtopk.loss_scale import LossScaleOptimizer
from tf_regtopk.optimizer import SparsifiedOptimizer
from tf_regtopk.sparsifiers import Dense
from tf_regtopk.sparsifiers import RandomK
from tf_regtopk.sparsifiers import RegTopK
from tf_regtopk.sparsifiers import Sparsifier
from tf_regtopk.sparsifiers import TopK
from tf_regtopk.strategy import MultiWorkerMirroredStrategy
from tf_regtopk.value_codecs import BFloat16
from tf_regtopk.value_codecs import Float16
from tf_regtopk.value_codecs import Float32
from tf_regtopk.value_codecs import Natural
from tf_regtopk.value_codecs import ScaledSign
from tf_regtopk.value_codecs import Uniform
from tf_regtopk.value_codecs import ValueCodec
from tf_regtopk.version import __version__
from tf_regtopk.warmup import DensityWarmup
from tf_regtopk.wire import WireReport
from tf_regtopk.worker_files import worker_path

__all__ = [
    "EF21",
    "Accumulate",
    "BFloat16",
    "Backup",
    "Codec",
    "CompressedDownlink",
    "Dense",
    "DensityWarmup",
    "ErrorFeedback",
    "Float16",
    "Float32",
    "LearnedShift",
    "LossScaleOptimizer",
    "MultiWorkerMirroredStrategy",
    "Natural",
    "NoFeedback",
    "RandomK",
    "RegTopK",
    "ScaledSign",
    "SparsifiedOptimizer",
    "Sparsifier",
    "TopK",
    "Uniform",
    "ValueCodec",
    "WireReport",
    "__version__",
    "load_scope",
    "worker_path",
]
