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


def gather_from_workers(numbers, strategy):
    """Gives every worker what all workers say, and so waits for all of them.

    Args:
        numbers: List of integers, as many on every worker.
        strategy: The `tf.distribute.Strategy` of the workers.

    Returns:
        Array `[number of replicas, number of integers]`.
    """
    gathered = strategy.run(
        tf.function(lambda: all_gather(tf.constant(numbers, tf.int32)))
    )
    return strategy.experimental_local_results(gathered)[0].numpy()


def add_header(magnitude, step, payload):
    """Puts before a payload what all replicas have to know of this one.

    Args:
        magnitude: Float scalar, the largest magnitude this replica has met.
        step: Integer scalar, the number of steps this replica has taken.
        payload: int32 tensor `[length]`.

    Returns:
        int32 tensor, longer by 2 for a float32 magnitude, by 3 for a float64.
    """
    bits = tf.reshape(tf.bitcast(magnitude, tf.int32), [-1])
    step = tf.reshape(tf.cast(step, tf.int32), [1])
    return tf.concat([step, bits, payload], axis=0)


def split_header(payloads, step, dtype):
    """The inverse of `add_header` for the payloads of N replicas.

    Args:
        payloads: int32 tensor `[N, length]`.
        step: As in this replica's header.
        dtype: Float dtype of the magnitudes.

    Returns:
        `(magnitudes, payloads)`: a float tensor `[N]` and an int32 tensor.

    Raises:
        tf.errors.InvalidArgumentError: When run, if the replicas are not at the
            same step.
    """
    tf.debugging.assert_equal(
        payloads[:, 0],
        tf.cast(step, tf.int32),
        "The replicas must be at the same step. Were the workers restored from "
        "different checkpoints?",
    )
    num_words = dtype.size // 4
    bits = payloads[:, 1 : 1 + num_words]
    if num_words == 1:
        bits = bits[:, 0]
    return tf.bitcast(bits, dtype), payloads[:, 1 + num_words :]


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
