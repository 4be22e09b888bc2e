"""The exchange between replicas: the only module that communicates."""

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk import strategy as strategy_lib
from tf_regtopk import watchdog
from tf_regtopk import words


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
            lambda: keras_internals.gather_among_workers(
                shares, self._worker, self.count
            )
        )
        return tf.reshape(gathered, [self.count, -1])[:, :length]


def all_gather(payload, num_used=None):
    """Gives every replica the payloads of all replicas, by one all-gather.

    To be called in a replica context.

    Args:
        payload: Tensor `[length]` of held words, of the same length on every
            replica.
        num_used: Scalar int32 tensor: how many words of this payload have to be
            sent, the others being 0. Defaults to all. May differ from replica
            to replica, which first exchange it, unless they are of one host,
            where all words are sent at once.

    Returns:
        Tensor `[N, length]` of held words, the same on each of the N replicas.
    """
    replica = tf.distribute.get_replica_context()
    num_replicas = replica.num_replicas_in_sync
    if num_replicas == 1:
        return payload[tf.newaxis]
    length = payload.shape[0]
    if keras_internals.gathers_fixed_lengths():
        num_used = None
    if num_used is not None:
        payload = payload[: _largest(num_used, length)]
    gathered = tf.reshape(_gather(payload), [num_replicas, -1])
    if num_used is not None:
        padding = length - tf.shape(gathered)[1]
        gathered = tf.pad(gathered, [[0, 0], [0, padding]])
    return tf.ensure_shape(gathered, [num_replicas, length])


def _largest(num_used, length):
    """The largest `num_used` of all replicas, in [1, `length`]."""
    numbers = _gather(words.hold(num_used)[tf.newaxis])
    numbers = words.release(numbers, tf.int32)
    # A collective of nothing would end the process.
    return tf.clip_by_value(tf.reduce_max(numbers), 1, length)


def _gather(payload):
    """The payloads of all replicas, `[N length]`, all of the same length."""
    if keras_internals.can_gather_at_once():
        return watchdog.watched(lambda: keras_internals.gather_at_once(payload))
    # Where nothing is fast: of floats, eager replicas would trace a function
    # each time.
    replica = tf.distribute.get_replica_context()
    payload = words.release(payload, tf.int32)
    gathered = watchdog.watched(lambda: replica.all_gather(payload, axis=0))
    return words.hold(gathered)


def gather_from_workers(numbers, strategy):
    """Gives every worker what all workers say, and so waits for all of them.

    Args:
        numbers: List of integers, as many on every worker.
        strategy: The `tf.distribute.Strategy` of the workers.

    Returns:
        Array `[number of replicas, number of integers]`.
    """

    def gather():
        held = all_gather(words.hold(tf.constant(numbers, tf.int32)))
        return words.release(held, tf.int32)

    gathered = strategy.run(tf.function(gather))
    return strategy.experimental_local_results(gathered)[0].numpy()


def add_header(magnitude, step, payload):
    """Puts before a payload what all replicas have to know of this one.

    Args:
        magnitude: Float scalar, the largest magnitude this replica has met.
        step: Integer scalar, the number of steps this replica has taken.
        payload: int32 tensor `[length]`.

    Returns:
        int32 tensor, longer by `header_words`.
    """
    bits = tf.reshape(tf.bitcast(magnitude, tf.int32), [-1])
    step = tf.reshape(tf.cast(step, tf.int32), [1])
    return tf.concat([step, bits, payload], axis=0)


def header_words(dtype):
    """Number of words of a header with a magnitude of a float dtype."""
    return 1 + dtype.size // 4


def split_header(payloads, dtype):
    """The inverse of `add_header` for the payloads of N replicas.

    Args:
        payloads: int32 tensor `[N, length]`.
        dtype: Float dtype of the magnitudes.

    Returns:
        `(magnitudes, steps, payloads)`: a float tensor `[N]`, an int32 tensor
        `[N]`, and an int32 tensor.
    """
    bits = payloads[:, 1 : header_words(dtype)]
    if dtype.size == 4:
        bits = bits[:, 0]
    return (
        tf.bitcast(bits, dtype),
        payloads[:, 0],
        payloads[:, header_words(dtype) :],
    )


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
