"""The collectives of payloads and of gradients."""

from collections.abc import Sequence
import functools

import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.distribute import watchdog
from tf_regtopk.kernels import words


def all_gather(
    payload: tf.Tensor, num_used: tf.Tensor | None = None
) -> tf.Tensor:
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


def _largest(num_used: tf.Tensor, length: int) -> tf.Tensor:
    """The largest `num_used` of all replicas, in [1, `length`]."""
    numbers = _gather(words.hold(num_used)[tf.newaxis])
    numbers = words.release(numbers, tf.int32)
    # TensorFlow terminates the process in a collective of length 0.
    return tf.clip_by_value(tf.reduce_max(numbers), 1, length)


def _gather(payload: tf.Tensor) -> tf.Tensor:
    """The payloads of all replicas, `[N length]`, all of the same length."""
    if keras_internals.can_gather_at_once():
        return watchdog.watched(lambda: keras_internals.gather_at_once(payload))
    # The payload is int32 here, because of floats eager replicas would trace a
    # function each time.
    replica = tf.distribute.get_replica_context()
    payload = words.release(payload, tf.int32)
    gathered = watchdog.watched(lambda: replica.all_gather(payload, axis=0))
    return words.hold(gathered)


def all_to_all(payloads: tf.Tensor) -> tf.Tensor:
    """Gives every replica the payloads that all replicas have for it.

    To be called in a replica context. By one collective among the CPUs or GPUs
    of several workers. In one process, and where replicas run one after the
    other, everything is gathered, and each replica takes its part.

    Args:
        payloads: Tensor `[N, length]` of held words: the row of each replica is
            for that replica.

    Returns:
        Tensor `[N, length]` of held words: the row of each replica is from that
        replica.
    """
    num_replicas, length = payloads.shape
    if num_replicas == 1:
        return payloads
    if keras_internals.can_exchange_at_once():
        return watchdog.watched(
            lambda: keras_internals.exchange_at_once(payloads)
        )
    gathered = all_gather(tf.reshape(payloads, [-1]))
    replica = tf.distribute.get_replica_context()
    gathered = tf.reshape(gathered, [num_replicas, num_replicas, length])
    return gathered[:, replica.replica_id_in_sync_group]


def gather_among_workers(
    payload: tf.Tensor, worker: int, num_workers: int
) -> tf.Tensor:
    """Gives every worker the payloads of all workers.

    To be called in a replica context, on all replicas. Each replica of a worker
    sends its share of the words, so that the worker sends its payload once.

    Args:
        payload: Tensor `[length]` of held words, the same on all replicas of a
            worker.
        worker: Rank of this worker.
        num_workers: Number of workers.

    Returns:
        Tensor `[number of workers, length]` of held words.
    """
    shares = _shares(payload, num_workers)
    if shares.shape[0] == 1:
        return all_gather(payload)
    gathered = watchdog.watched(
        lambda: keras_internals.gather_among_workers(
            shares, worker, num_workers
        )
    )
    return tf.reshape(gathered, [num_workers, -1])[:, : payload.shape[0]]


def all_to_all_among_workers(
    payloads: tf.Tensor, worker: int, num_workers: int
) -> tf.Tensor:
    """Gives every worker the payloads that all workers have for it.

    To be called in a replica context, on all replicas. Each replica of a worker
    sends its share of the words, so that the worker sends each payload once.

    Args:
        payloads: Tensor `[number of workers, length]` of held words, the same
            on all replicas of a worker: the row of each worker is for that
            worker.
        worker: Rank of this worker.
        num_workers: Number of workers.

    Returns:
        Tensor `[number of workers, length]` of held words, the same on all
        replicas of a worker: the row of each worker is from that worker.
    """
    shares = _shares(payloads, num_workers)
    if shares.shape[1] == 1:
        return all_to_all(payloads)
    received = watchdog.watched(
        lambda: keras_internals.exchange_among_workers(
            shares, worker, num_workers
        )
    )
    return tf.reshape(received, [num_workers, -1])[:, : payloads.shape[1]]


def _shares(payloads: tf.Tensor, num_workers: int) -> tf.Tensor:
    """The shares of the replicas of a worker, `[..., replicas, length]`.

    The words of the last axis are divided, with zeros at the end.
    """
    replica = tf.distribute.get_replica_context()
    num_replicas = replica.num_replicas_in_sync // num_workers
    *rows, length = payloads.shape
    share = -(-length // num_replicas)
    padding = [[0, 0]] * len(rows) + [[0, share * num_replicas - length]]
    return tf.reshape(tf.pad(payloads, padding), [*rows, num_replicas, share])


def gather_from_workers(
    numbers: Sequence[int], strategy: tf.distribute.Strategy
) -> np.ndarray:
    """Gives every worker what all workers say, and so waits for all of them.

    Args:
        numbers: List of integers, as many on every worker.
        strategy: The `tf.distribute.Strategy` of the workers.

    Returns:
        Array `[number of replicas, number of integers]`, the replicas of the
        first worker first.
    """
    worker, _ = strategy_lib.worker_number(strategy)
    gathered = strategy.run(
        _gather_numbers, (tf.constant([worker, *numbers], tf.int32),)
    )
    rows = strategy.experimental_local_results(gathered)[0].numpy()
    # TensorFlow orders workers by their names: task 10 comes before task 2.
    return rows[np.argsort(rows[:, 0], kind="stable"), 1:]


def _gather_in_replica(numbers: tf.Tensor) -> tf.Tensor:
    return words.release(all_gather(words.hold(numbers)), tf.int32)


# Many calls share what is traced for a strategy and a number of integers.
_gather_numbers = tf.function(_gather_in_replica, autograph=False)


def all_reduce_sum(
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
) -> list[tf.Tensor | tf.IndexedSlices]:
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
            functools.partial(
                replica.all_reduce, tf.distribute.ReduceOp.SUM, of_dtype
            )
        )
        for i, total in zip(places, totals, strict=True):
            summed[i] = total
    return summed
