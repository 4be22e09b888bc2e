"""Keras training that sends only the gradient entries worth sending."""

from tf_regtopk import methods
from tf_regtopk.callbacks.backup import Backup
from tf_regtopk.callbacks.density_warmup import DensityWarmup
from tf_regtopk.callbacks.load_scope import load_scope
from tf_regtopk.codecs.index_codecs import IndexCodec
from tf_regtopk.codecs.payload import Codec
from tf_regtopk.codecs.value_codecs import BFloat16
from tf_regtopk.codecs.value_codecs import Float16
from tf_regtopk.codecs.value_codecs import Float32
from tf_regtopk.codecs.value_codecs import Natural
from tf_regtopk.codecs.value_codecs import ScaledSign
from tf_regtopk.codecs.value_codecs import Uniform
from tf_regtopk.codecs.value_codecs import ValueCodec
from tf_regtopk.codecs.wire_report import WireReport
from tf_regtopk.distribute.strategy import MultiWorkerMirroredStrategy
from tf_regtopk.distribute.topology import AllGather
from tf_regtopk.distribute.topology import AllReduce
from tf_regtopk.distribute.topology import Cluster
from tf_regtopk.distribute.topology import EntryTopology
from tf_regtopk.distribute.topology import Hierarchical
from tf_regtopk.distribute.topology import Topology
from tf_regtopk.error_feedback.base import ErrorFeedback
from tf_regtopk.error_feedback.downlink import CompressedDownlink
from tf_regtopk.error_feedback.ef21 import EF21
from tf_regtopk.error_feedback.error_accumulation import Accumulate
from tf_regtopk.error_feedback.learned_shift import LearnedShift
from tf_regtopk.error_feedback.no_feedback import NoFeedback
from tf_regtopk.optimizers.loss_scale import LossScaleOptimizer
from tf_regtopk.optimizers.sparsified import SparsifiedOptimizer
from tf_regtopk.optimizers.wrapping import unwrap
from tf_regtopk.optimizers.wrapping import wrap
from tf_regtopk.saving.worker_files import worker_path
from tf_regtopk.sparsifiers.base import Sparsifier
from tf_regtopk.sparsifiers.dense import Dense
from tf_regtopk.sparsifiers.random_k import RandomK
from tf_regtopk.sparsifiers.reg_top_k import RegTopK
from tf_regtopk.sparsifiers.top_k import TopK
from tf_regtopk.version import __version__

__all__ = [
    "EF21",
    "Accumulate",
    "AllGather",
    "AllReduce",
    "BFloat16",
    "Backup",
    "Cluster",
    "Codec",
    "CompressedDownlink",
    "Dense",
    "DensityWarmup",
    "EntryTopology",
    "ErrorFeedback",
    "Float16",
    "Float32",
    "Hierarchical",
    "IndexCodec",
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
    "Topology",
    "Uniform",
    "ValueCodec",
    "WireReport",
    "__version__",
    "load_scope",
    "methods",
    "unwrap",
    "worker_path",
    "wrap",
]
