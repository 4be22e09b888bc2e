"""Keras training that sends only the gradient entries worth sending.

    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.1), tf_regtopk.RegTopK(density=0.001))

What there is, and for what:

    SparsifiedOptimizer       wraps a Keras optimizer; LossScaleOptimizer around
                              it for mixed_float16
    wrap, unwrap              the same for a model that is compiled already
    RegTopK, TopK, RandomK,   which entries are sent; Sparsifier is the base
      Dense                   class of your own
    Accumulate, EF21,         what becomes of the entries that are not sent;
      LearnedShift, ...       base class ErrorFeedback
    Codec, Natural, ...       how entries are encoded; base classes IndexCodec,
                              ValueCodec
    AllGather, Hierarchical,  who sends to whom; base classes EntryTopology,
      ReduceScatter,          Topology
      AllReduce
    DecentralizedOptimizer,   replicas with weights of their own; base class
      Ring, averaged, ...     MixingTopology, MixingRule; CrossGradients and
                              CrossGradientTraining for data that differ much
    methods                   complete methods: recommended, and published
    MultiWorkerMirroredStrategy  for `fit` on several hosts
    Monitor, DensityDecay,    callbacks: numbers in the logs, more entries while
      DensityWarmup           the learning rate is large, or in the first epochs
    Backup, load_scope,       saving and resuming, on several hosts as well
      worker_path

`python -m tf_regtopk.advise` says when to compress, and
`python -m tf_regtopk.selftest` checks a machine.
"""

from tf_regtopk.launch.started_as import (
    command_without_tensorflow as _needs_no_tensorflow,
)
from tf_regtopk.version import __version__

# Two commands would wait for TensorFlow, and keep it in memory, for nothing.
if not _needs_no_tensorflow():
    from tf_regtopk import methods
    from tf_regtopk.callbacks.backup import Backup
    from tf_regtopk.callbacks.consensus import averaged
    from tf_regtopk.callbacks.consensus import ConsensusDistance
    from tf_regtopk.callbacks.consensus import EvaluateAverage
    from tf_regtopk.callbacks.consensus import tracked
    from tf_regtopk.callbacks.density_decay import DensityDecay
    from tf_regtopk.callbacks.density_warmup import DensityWarmup
    from tf_regtopk.callbacks.load_scope import load_scope
    from tf_regtopk.callbacks.monitor import Monitor
    from tf_regtopk.callbacks.skew_scout import SkewScout
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
    from tf_regtopk.distribute.mixing import MixingTopology
    from tf_regtopk.distribute.mixing_groups import Cliques
    from tf_regtopk.distribute.mixing_groups import PeriodicGlobalAveraging
    from tf_regtopk.distribute.mixing_groups import RingPass
    from tf_regtopk.distribute.mixing_rules import AverageTracker
    from tf_regtopk.distribute.mixing_rules import LinearGossip
    from tf_regtopk.distribute.mixing_rules import MixingRule
    from tf_regtopk.distribute.mixing_rules import NonlinearGossip
    from tf_regtopk.distribute.mixing_topologies import Complete
    from tf_regtopk.distribute.mixing_topologies import Exponential
    from tf_regtopk.distribute.mixing_topologies import Grid
    from tf_regtopk.distribute.mixing_topologies import OnePeerExponential
    from tf_regtopk.distribute.mixing_topologies import Ring
    from tf_regtopk.distribute.mixing_topologies import Torus
    from tf_regtopk.distribute.reduce_scatter import ReduceScatter
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
    from tf_regtopk.error_feedback.local_adam import LocalAdam
    from tf_regtopk.error_feedback.no_feedback import NoFeedback
    from tf_regtopk.optimizers.cross_gradient_training import (
        CrossGradientTraining,
    )
    from tf_regtopk.optimizers.decentralized import DecentralizedOptimizer
    from tf_regtopk.optimizers.layer_mask import LayerMask
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
    from tf_regtopk.steps.cross_gradients import CrossGradients

__all__ = [
    "EF21",
    "Accumulate",
    "AllGather",
    "AllReduce",
    "AverageTracker",
    "BFloat16",
    "Backup",
    "Cliques",
    "Cluster",
    "Codec",
    "Complete",
    "CompressedDownlink",
    "ConsensusDistance",
    "CrossGradientTraining",
    "CrossGradients",
    "DecentralizedOptimizer",
    "Dense",
    "DensityDecay",
    "DensityWarmup",
    "EntryTopology",
    "ErrorFeedback",
    "EvaluateAverage",
    "Exponential",
    "Float16",
    "Float32",
    "Grid",
    "Hierarchical",
    "IndexCodec",
    "LayerMask",
    "LearnedShift",
    "LinearGossip",
    "LocalAdam",
    "LossScaleOptimizer",
    "MixingRule",
    "MixingTopology",
    "Monitor",
    "MultiWorkerMirroredStrategy",
    "Natural",
    "NoFeedback",
    "NonlinearGossip",
    "OnePeerExponential",
    "PeriodicGlobalAveraging",
    "RandomK",
    "ReduceScatter",
    "RegTopK",
    "Ring",
    "RingPass",
    "ScaledSign",
    "SkewScout",
    "SparsifiedOptimizer",
    "Sparsifier",
    "TopK",
    "Topology",
    "Torus",
    "Uniform",
    "ValueCodec",
    "WireReport",
    "__version__",
    "averaged",
    "load_scope",
    "methods",
    "tracked",
    "unwrap",
    "worker_path",
    "wrap",
]
