"""The exchange between replicas: the only module that communicates."""

import tensorflow as tf

from tf_regtopk import keras_internals


def all_gather(payload, num_used=None):
    """Gives every replica the payloads of all replicas, by one all-gather.

    To be called in a replica context.

    Args:
        payload: int32 tensor `[length]`, of the same length on every replica.
        num_used: Scalar int32 tensor: how many words of this payload have to be
            sent, the others being 0. Defaults to all. May differ from replica
            to replica.

    Returns:
        int32 tensor `[N, length]`, the same on each of the N replicas.

    Raises:
        tf.errors.InvalidArgumentError: When run, if what arrived are not N such
            payloads.
    """
    replica = tf.distribute.get_replica_context()
    num_replicas = replica.num_replicas_in_sync
    if num_replicas > 1 and num_used is not None:
        used = tf.concat([num_used[tf.newaxis], payload[:num_used]], axis=0)
        return _split_used(
            replica.all_gather(used, axis=0), num_replicas, payload.shape[0]
        )
    gathered = payload
    if num_replicas > 1 and keras_internals.can_exchange_at_once():
        gathered = keras_internals.exchange_at_once(payload)
    elif num_replicas > 1:
        gathered = replica.all_gather(payload, axis=0)
    return tf.reshape(gathered, [num_replicas, *payload.shape])


def _split_used(gathered, num_replicas, length):
    """Payloads `[N, length]` of what was used of each, behind its length."""
    total = tf.size(gathered)
    payloads, start = [], 0
    for _ in range(num_replicas):
        num_used = tf.reduce_sum(gathered[start : start + 1])
        start, end = start + 1, start + 1 + num_used
        check = tf.debugging.Assert(
            (start <= total)
            & (num_used >= 0)
            & (num_used <= length)
            & (end <= total),
            ["The payloads must be complete. Received length:", num_used],
        )
        # Else a graph may go on beside a check that fails.
        with tf.control_dependencies([check]):
            payload = gathered[start:end]
        payload = tf.pad(payload, [[0, length - tf.size(payload)]])
        payloads.append(tf.ensure_shape(payload, [length]))
        start = end
    check = tf.debugging.Assert(
        tf.equal(start, total),
        ["The payloads must be complete. Received left over:", total - start],
    )
    with tf.control_dependencies([check]):
        return tf.stack(payloads)


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


def add_header(magnitude, step, payload, num_used):
    """Puts before a payload what all replicas have to know of this one.

    Args:
        magnitude: Float scalar, the largest magnitude this replica has met.
        step: Integer scalar, the number of steps this replica has taken.
        payload: int32 tensor `[length]`.
        num_used: Scalar int32 tensor, as of `all_gather`.

    Returns:
        `(payload, num_used)`, both longer by `header_words`.
    """
    bits = tf.reshape(tf.bitcast(magnitude, tf.int32), [-1])
    step = tf.reshape(tf.cast(step, tf.int32), [1])
    return (
        tf.concat([step, bits, payload], axis=0),
        num_used + header_words(magnitude.dtype),
    )


def header_words(dtype):
    """Number of words of a header with a magnitude of a float dtype."""
    return 1 + dtype.size // 4


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
    is_same_step = tf.debugging.assert_equal(
        payloads[:, 0],
        tf.cast(step, tf.int32),
        "The replicas must be at the same step. Were the workers restored from "
        "different checkpoints?",
    )
    with tf.control_dependencies([is_same_step]):
        payloads = tf.identity(payloads)
    bits = payloads[:, 1 : header_words(dtype)]
    if dtype.size == 4:
        bits = bits[:, 0]
    return tf.bitcast(bits, dtype), payloads[:, header_words(dtype) :]


def check_payloads(is_valid):
    """Raises where a payload held no k entries of the gradient.

    Args:
        is_valid: Bool tensor `[N]`, one for each replica.

    Returns:
        Scalar bool tensor, true, for what must wait for the check.

    Raises:
        tf.errors.InvalidArgumentError: When run, with the replicas' numbers.
    """
    are_valid = tf.reduce_all(is_valid)
    check = tf.debugging.Assert(
        are_valid,
        [
            "Every payload must hold different, rising indices of the "
            "gradient. Do all workers run the same model and optimizer? "
            "Received valid payloads of the replicas:",
            is_valid,
        ],
    )
    with tf.control_dependencies([check]):
        return tf.identity(are_valid)


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
