"""The exchange between replicas: the only module that communicates."""

import tensorflow as tf


def all_gather(payload):
    """Gives every replica the payloads of all replicas, by one all-gather.

    To be called in a replica context.

    Args:
        payload: int32 tensor `[length]`, of the same length on every replica.

    Returns:
        int32 tensor `[N, length]`, the same on each of the N replicas.
    """
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync > 1:
        payload = replica.all_gather(payload, axis=0)
    return tf.reshape(payload, [replica.num_replicas_in_sync, -1])


def all_reduce_sum(gradients):
    """Sums dense gradients over the replicas, as Keras itself does.

    Args:
        gradients: List of tensors or `tf.IndexedSlices`.

    Returns:
        List of the same structure, the same on every replica.
    """
    if not gradients:
        return []
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
