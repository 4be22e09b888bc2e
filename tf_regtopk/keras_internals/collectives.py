"""Private parts of `tf.distribute`'s collectives."""

from collections.abc import Sequence
import threading
from typing import Any
import weakref

import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.eager import context
from tensorflow.python.ops import collective_ops

from tf_regtopk.keras_internals import collective_keys


def abort_collectives(message: str) -> None:
    """Aborts all collectives of this process by a `DeadlineExceededError`."""
    context.context().abort_collective_ops(tf.errors.DEADLINE_EXCEEDED, message)


def can_gather_at_once() -> bool:
    """Returns whether `gather_at_once` serves this replica's context.

    `gather_at_once` would block eager replicas, because these run one after the
    other. A `MirroredStrategy` may have been given cross-device operations that
    are no collectives.
    """
    cross_device_ops = tf.distribute.get_strategy().extended._cross_device_ops
    return not tf.executing_eagerly() and hasattr(
        cross_device_ops, "_launchers"
    )


def gathers_fixed_lengths() -> bool:
    """Returns whether `gather_at_once` needs one length in all steps.

    TensorFlow remembers the length by the key of the collective. A single
    process gives the same key in all steps, see `_gather`.
    """
    return can_gather_at_once() and not _are_workers()


def gather_at_once(payload: tf.Tensor) -> tf.Tensor:
    """Gathers the payloads of all replicas by one collective.

    The public all-gather takes two collectives: one for the shapes, one for the
    payloads, which are padded and cut. It also passes int32 through the host of
    a single GPU.

    Args:
        payload: Tensor `[length]`, of the same length on every replica.

    Returns:
        Tensor `[N length]`.
    """
    return _gather(payload, _launcher())


def can_exchange_at_once() -> bool:
    """Returns whether `exchange_at_once` serves this replica's context."""
    return can_gather_at_once() and _are_workers()


def exchange_at_once(payloads: tf.Tensor) -> tf.Tensor:
    """Sends each replica its payload by one collective, among workers.

    Args:
        payloads: Tensor `[N, length]`, of the same shape on every replica: the
            row of each replica is for that replica.

    Returns:
        Tensor `[N, length]`: the row of each replica is from that replica.
    """
    launcher = _launcher()
    arguments = _arguments(launcher)
    with tf.device(launcher._device):
        return collective_ops.all_to_all_v2(payloads, *arguments)


def sum_within_worker(
    gradients: Sequence[tf.Tensor], worker: int, num_workers: int
) -> list[tf.Tensor]:
    """Sums gradients over the replicas of this worker.

    Args:
        gradients: List of tensors.
        worker: Rank of this worker.
        num_workers: Number of workers.

    Returns:
        List of tensors, the same on every replica of the worker.
    """
    within, _ = _launchers_of_worker(worker, num_workers)
    sums = list(gradients)
    # Each dtype is summed on its own, because a collective takes only one
    # dtype.
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        places = [i for i, g in enumerate(gradients) if g.dtype == dtype]
        totals = within.batch_all_reduce([[gradients[i] for i in places]])
        for i, total in zip(places, totals, strict=True):
            sums[i] = total
    return sums


def gather_among_workers(
    shares: tf.Tensor, worker: int, num_workers: int
) -> tf.Tensor:
    """Gathers a payload from each worker, which each worker sends only once.

    Each replica of a worker sends its share to the replicas of the same place
    in the other workers, and the shares that arrive there to the other replicas
    of its own worker.

    Args:
        shares: Tensor `[replicas of a worker, length]`, the same on all
            replicas of a worker.
        worker: Rank of this worker.
        num_workers: Number of workers.

    Returns:
        Tensor `[number of workers, replicas of a worker, length]`.
    """
    within, across = _launchers_of_worker(worker, num_workers)
    num_replicas, length = shares.shape
    share = shares[tf.distribute.get_replica_context()._replica_id]
    received = tf.reshape(_gather(share, across), [num_workers, length])
    return _gather_shares(received, within, num_replicas)


def exchange_among_workers(
    shares: tf.Tensor, worker: int, num_workers: int
) -> tf.Tensor:
    """Sends each worker its payload, which each worker sends only once.

    As `gather_among_workers`, but to each worker another payload.

    Args:
        shares: Tensor `[number of workers, replicas of a worker, length]`, the
            same on all replicas of a worker: the row of each worker is for that
            worker.
        worker: Rank of this worker.
        num_workers: Number of workers.

    Returns:
        Tensor `[number of workers, replicas of a worker, length]`: the row of
        each worker is from that worker.
    """
    within, across = _launchers_of_worker(worker, num_workers)
    share = shares[:, tf.distribute.get_replica_context()._replica_id]
    with tf.device(across._device):
        received = collective_ops.all_to_all_v2(share, *_arguments(across))
    return _gather_shares(received, within, shares.shape[1])


def _gather_shares(
    received: tf.Tensor,
    within: "cross_device_utils.CollectiveReplicaLauncher",
    num_replicas: int,
) -> tf.Tensor:
    """Gathers what the replicas of a worker have received.

    Args:
        received: Tensor `[number of workers, length]`, of this replica's place.
        within: The launcher of the replicas of this worker.
        num_replicas: Number of replicas of a worker.

    Returns:
        Tensor `[number of workers, replicas of a worker, length]`.
    """
    num_workers, length = received.shape
    # The place comes first, because TensorFlow gathers the devices of a worker
    # in an order of its own.
    place = tf.range(num_replicas, dtype=received.dtype)
    place = place[tf.distribute.get_replica_context()._replica_id]
    gathered = _gather(
        tf.concat([place[tf.newaxis], tf.reshape(received, [-1])], axis=0),
        within,
    )
    gathered = tf.reshape(gathered, [num_replicas, 1 + num_workers * length])
    gathered = tf.gather(gathered, tf.argsort(gathered[:, 0]))
    gathered = tf.reshape(gathered[:, 1:], [num_replicas, num_workers, length])
    return tf.transpose(gathered, [1, 0, 2])


def _gather(
    payload: tf.Tensor, launcher: "cross_device_utils.CollectiveReplicaLauncher"
) -> tf.Tensor:
    """Gathers the payloads of a launcher's group, one after the other."""
    arguments = _arguments(launcher)
    with tf.device(launcher._device):
        if "CPU" not in launcher._device or not _are_workers():
            return collective_ops.all_gather_v2(payload, *arguments)
        # CPUs of several workers use an all-to-all, because an all-gather
        # passes payloads on from replica to replica, N - 1 times. The
        # all-to-all takes as long as one message, and as many bytes.
        copies = tf.tile(payload[tf.newaxis], [launcher._group_size, 1])
        return tf.reshape(
            collective_ops.all_to_all_v2(copies, *arguments), [-1]
        )


def _arguments(
    launcher: "cross_device_utils.CollectiveReplicaLauncher",
) -> list[Any]:
    """The arguments of a collective that follow its input."""
    options = launcher._options
    if _are_workers():
        instance_key = launcher._next_instance_key()
    else:
        # TensorFlow gives a new key to each call, for workers that trace at
        # different times. A single process needs a fixed key, because new keys
        # fail within loops such as that of `steps_per_execution`.
        instance_key = launcher._collective_keys.get_instance_key(
            launcher._group_key, launcher._device
        )
    return [
        launcher._group_size,
        launcher._group_key,
        instance_key,
        options.implementation.value,
        options.timeout_seconds or 0,
        launcher._get_ordering_token(),
    ]


def _are_workers() -> bool:
    return isinstance(
        tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy
    )


def _launcher() -> "cross_device_utils.CollectiveReplicaLauncher":
    """Returns the launcher of this replica's collectives among all replicas."""
    replica = tf.distribute.get_replica_context()
    launchers = replica.strategy.extended._cross_device_ops._launchers
    return launchers[replica._replica_id]


_launchers_of_workers: weakref.WeakKeyDictionary[
    tf.distribute.Strategy,
    list[
        tuple[
            "cross_device_utils.CollectiveReplicaLauncher",
            "cross_device_utils.CollectiveReplicaLauncher",
        ]
    ],
] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _launchers_of_worker(
    worker: int, num_workers: int
) -> tuple[
    "cross_device_utils.CollectiveReplicaLauncher",
    "cross_device_utils.CollectiveReplicaLauncher",
]:
    """Returns this replica's launchers `(within, across)` for smaller groups.

    `within` serves the replicas of this worker, `across` the replicas of the
    same place in every worker.
    """
    replica = tf.distribute.get_replica_context()
    if tf.executing_eagerly():
        raise RuntimeError(
            "`hierarchical` must be used in a `tf.function`, not with "
            "`run_eagerly`: eager replicas run one after the other, and cannot "
            "meet."
        )
    strategy = replica.strategy
    with _lock:
        if strategy not in _launchers_of_workers:
            every = strategy.extended._cross_device_ops._launchers
            first = collective_keys.FIRST_GROUP_KEY_OF_WORKERS + num_workers
            _launchers_of_workers[strategy] = [
                (
                    collective_keys.group_launcher(
                        collective_keys.FIRST_GROUP_KEY_OF_WORKERS + worker,
                        len(every),
                        launcher,
                    ),
                    collective_keys.group_launcher(
                        first + place, num_workers, launcher
                    ),
                )
                for place, launcher in enumerate(every)
            ]
    return _launchers_of_workers[strategy][replica._replica_id]
