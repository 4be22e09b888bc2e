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
    gathered = payload
    if replica.num_replicas_in_sync > 1:
        gathered = replica.all_gather(payload, axis=0)
    return tf.reshape(gathered, [replica.num_replicas_in_sync, *payload.shape])


def all_reduce_sum(gradients):
    """Sums whole gradients over the replicas, as Keras itself does.

    Args:
        gradients: List of tensors or `tf.IndexedSlices`.

    Returns:
        List of the same structure, the same on every replica.
    """
    replica = tf.distribute.get_replica_context()
    summed = list(gradients)
    # A collective takes one dtype only.
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        places = [i for i, g in enumerate(gradients) if g.dtype == dtype]
        totals = replica.all_reduce(
            tf.distribute.ReduceOp.SUM, [gradients[i] for i in places]
        )
        for i, total in zip(places, totals, strict=True):
            summed[i] = total
    return summed
