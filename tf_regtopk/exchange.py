"""The exchange between replicas: the only module that communicates."""

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk import strategy as strategy_lib
from tf_regtopk import watchdog


class Participants:
    """Who exchanges entries: every replica, or every worker as a whole.

    To be created in the scope of the strategy. The methods and `number` are for
    a replica context.

    Args:
        are_workers: Boolean. If true, the replicas of a worker first sum their
            gradients, and from then on all do the same; each sends its share of
            what the worker has to send.
    """

    def __init__(self, are_workers=False):
        strategy = tf.distribute.get_strategy()
        self._worker, num_workers = strategy_lib.worker_number(strategy)
        num_replicas = strategy.num_replicas_in_sync
        self._replicas_per_worker = num_replicas // num_workers
        self._are_groups = are_workers and self._replicas_per_worker > 1
        self.count = num_workers if are_workers else num_replicas

    @property
    def local(self):
        """The numbers of those in this process."""
        if self._are_groups:
            return range(self._worker, self._worker + 1)
        first = self._worker * self._replicas_per_worker
        return range(first, first + self._replicas_per_worker)

    @property
    def copies(self):
        """How many replicas share a participant's state."""
        return self._replicas_per_worker if self._are_groups else 1

    @property
    def number(self):
        """The number of the participant that this replica belongs to."""
        if self._are_groups:
            return tf.constant(self._worker)
        replica = tf.distribute.get_replica_context()
        return tf.convert_to_tensor(replica.replica_id_in_sync_group)

    def sum_within(self, gradients):
        """Sums gradients over the replicas of this participant.

        Args:
            gradients: List of tensors or None.

        Returns:
            List of the same structure.
        """
        if not self._are_groups:
            return gradients
        present = [g for g in gradients if g is not None]
        if self.count == 1:
            sums = iter(all_reduce_sum(present))
        else:
            sums = iter(
                watchdog.watched(
                    lambda: keras_internals.sum_within_worker(
                        present, self._worker, self.count
                    )
                )
            )
        return [None if g is None else next(sums) for g in gradients]

    def all_gather(self, payload, num_used=None):
        """As the function `all_gather`, among the participants."""
        if not self._are_groups:
            return all_gather(payload, num_used)
        if self.count == 1:
            return payload[tf.newaxis]
        length = payload.shape[0]
        share = -(-length // self._replicas_per_worker)
        padding = share * self._replicas_per_worker - length
        shares = tf.reshape(tf.pad(payload, [[0, padding]]), [-1, share])
        gathered = watchdog.watched(
            lambda: keras_internals.exchange_among_workers(
                shares, self._worker, self.count
            )
        )
        return tf.reshape(gathered, [self.count, -1])[:, :length]


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
        used = watchdog.watched(lambda: replica.all_gather(used, axis=0))
        return _split_used(used, num_replicas, payload.shape[0])
    gathered = payload
    if num_replicas > 1 and keras_internals.can_exchange_at_once():
        gathered = watchdog.watched(
            lambda: keras_internals.exchange_at_once(payload)
        )
    elif num_replicas > 1:
        gathered = watchdog.watched(lambda: replica.all_gather(payload, axis=0))
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
        of_dtype = [gradients[i] for i in places]
        totals = watchdog.watched(
            lambda of_dtype=of_dtype: replica.all_reduce(
                tf.distribute.ReduceOp.SUM, of_dtype
            )
        )
        for i, total in zip(places, totals, strict=True):
            summed[i] = total
    return summed
