"""The private parts of Keras and TensorFlow that this package relies on.

Beyond what Keras's own optimizers use of their base class.  Nothing public
serves for these; each has a test that fails when upstream changes it.
"""

import tensorflow as tf
from tensorflow.python.ops import collective_ops
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


def can_exchange_at_once():
    """Whether `exchange_at_once` serves this replica: on workers' CPUs.

    In a replica context. Elsewhere it has not been tried (GPUs), is not needed
    (one process), or would block (eager replicas run one after the other).
    """
    strategy = tf.distribute.get_strategy()
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and not tf.executing_eagerly()
        and "CPU" in _launcher()._device
    )


def exchange_at_once(payload):
    """An all-gather in one round, in which each replica sends to all others.

    The public one makes two: of the shapes, then of the payloads; and each
    passes the payloads on from replica to replica, N - 1 times, where this one
    takes as long as one message. It sends as many bytes.

    Args:
        payload: Tensor `[length]`, of the same length on every replica.

    Returns:
        Tensor `[N, length]`.
    """
    launcher = _launcher()
    options = launcher._options
    with tf.device(launcher._device):
        return collective_ops.all_to_all_v2(
            tf.tile(payload[tf.newaxis], [launcher._group_size, 1]),
            launcher._group_size,
            launcher._group_key,
            launcher._next_instance_key(),
            communication_hint=options.implementation.value,
            timeout=options.timeout_seconds or 0,
            ordering_token=launcher._get_ordering_token(),
        )


def _launcher():
    """What launches the collectives of this replica."""
    replica = tf.distribute.get_replica_context()
    launchers = replica.strategy.extended._cross_device_ops._launchers
    return launchers[replica._replica_id]
