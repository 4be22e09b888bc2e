"""The private parts of Keras and TensorFlow that this package relies on.

Beyond what Keras's own optimizers use of their base class.  Nothing public
serves for these; each has a test that fails when upstream changes it.
"""

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def take_aggregated_gradients(optimizer):
    """Makes a Keras optimizer take gradients as already summed over replicas.

    Keras 3.15 sums inside the optimizer, in `_all_reduce_sum_gradients`, after
    clipping and just before the update, and has no switch for it. To be called
    when the optimizer is built: a `MultiOptimizer` gets its parts there.
    """
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        part._all_reduce_sum_gradients = list


def strategy_of(optimizer):
    """The strategy in whose scope a Keras optimizer was created."""
    return optimizer._distribution_strategy


def in_xla_context():
    """Whether the code being traced will be compiled by XLA as a whole."""
    return control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )
