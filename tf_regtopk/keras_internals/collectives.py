"""Private parts of `tf.distribute`'s collectives."""

from collections.abc import Sequence
import itertools
import threading
from typing import Any
import weakref

import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.eager import context
from tensorflow.python.ops import collective_ops
from tensorflow.python.ops import resource_variable_ops


def abort_collectives(message: str) -> None:
    """Aborts all collectives of this process by a `DeadlineExceededError`."""
    context.context().abort_collective_ops(tf.errors.DEADLINE_EXCEEDED, message)


# Far from the keys that TensorFlow counts, and from the largest int32.
# Two series, because both kinds of launchers may serve the same group.
_FIRST_INSTANCE_KEYS = (1 << 29, 3 << 28)
_COUNTER = "_tf_regtopk_counter"


def let_collectives_run_in_loops(
    strategy: tf.distribute.Strategy,
) -> None:
    """Lets functions with collectives be called in loops and branches.

    A collective needs a new key each time, the same on all replicas.
    TensorFlow 2.21 feeds the key when a function is called, which a function
    within a loop or a branch never is: "You must feed a value for placeholder
    tensor". Keras calls such functions with `steps_per_execution`. There, the
    key is counted in the graph, when the collective runs.

    Args:
        strategy: A strategy of several workers, or one whose collectives are
            kept apart: another one of its devices would count the same keys.
    """
    names = ("_cross_device_ops", "_host_cross_device_ops")
    for first_key, name in zip(_FIRST_INSTANCE_KEYS, names, strict=True):
        collectives = getattr(strategy.extended, name, None)
        for launcher in getattr(collectives, "_launchers", ()):
            if not hasattr(launcher, _COUNTER):
                with tf.init_scope(), tf.device("CPU:0"):
                    # This class, as for the launcher's own variable, because
                    # the strategy in scope would make one for each replica.
                    counter = resource_variable_ops.ResourceVariable(
                        first_key, dtype=tf.int32, trainable=False
                    )
                setattr(launcher, _COUNTER, counter)
                _count_in_loops(launcher, counter)


# Far from the keys that TensorFlow counts up from 1, and from those of the
# groups below and of `neighbours.py`.
_FIRST_GROUP_KEY_OF_STRATEGIES = 1 << 24
# Instance keys for a strategy. Those of 100 strategies are below
# `_FIRST_INSTANCE_KEYS`.
_NUM_INSTANCE_KEYS = 1 << 22
_strategy_numbers = itertools.count()
_apart: weakref.WeakSet[tf.distribute.Strategy] = weakref.WeakSet()


def keep_collectives_apart(strategy: tf.distribute.Strategy) -> None:
    """Gives the collectives of a strategy keys that no other strategy has.

    In a single process TensorFlow counts the keys of each strategy from the
    same numbers on, and never forgets the devices and the shapes that belong to
    a key. So a second strategy would fail with "Shape mismatch in the
    collective instance" where it has a payload of another length, as after a
    change of the density in a notebook. Workers keep TensorFlow's keys, because
    all processes must have the same ones.

    Args:
        strategy: Any strategy. Nothing happens the second time.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    collectives = getattr(strategy.extended, "_cross_device_ops", None)
    launchers = getattr(collectives, "_launchers", ())
    with _lock:
        if not launchers or strategy in _apart:
            return
        _apart.add(strategy)
        number = next(_strategy_numbers)
    keys = cross_device_utils.CollectiveKeys(
        _FIRST_GROUP_KEY_OF_STRATEGIES + number
    )
    devices = [launcher._device for launcher in launchers]
    group_key = keys.get_group_key(devices)
    # Functions that were traced before keep the group that all strategies have
    # in common, and take the instance keys from here.
    keys._instance_key_table[group_key] = dict.fromkeys(
        devices, (1 + number % 100) * _NUM_INSTANCE_KEYS
    )
    for launcher in launchers:
        launcher._collective_keys = keys
        launcher._group_key = group_key
    let_collectives_run_in_loops(strategy)


def _count_in_loops(
    launcher: "cross_device_utils.CollectiveReplicaLauncher",
    counter: tf.Variable,
) -> None:
    next_instance_key = launcher._next_instance_key

    def next_key() -> tf.Tensor:
        if not _is_in_function_of_loop():
            return next_instance_key()
        with tf.device("CPU:0"):
            # All workers run the same collectives in the same order.
            return tf.convert_to_tensor(counter.assign_add(1))

    launcher._next_instance_key = next_key


def _is_in_function_of_loop() -> bool:
    """Returns True while a function is traced that a loop or a branch calls."""
    graph = tf.compat.v1.get_default_graph()
    is_in_function = False
    while hasattr(graph, "outer_graph"):
        if not getattr(graph, "is_control_flow_graph", False):
            is_in_function = True
        elif is_in_function:
            return True
        graph = graph.outer_graph
    return False


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


# Keys start far from TensorFlow's, because TensorFlow counts up from 1.
_FIRST_GROUP_KEY = 1 << 20
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
            first = _FIRST_GROUP_KEY + num_workers
            _launchers_of_workers[strategy] = [
                (
                    _group_launcher(
                        _FIRST_GROUP_KEY + worker, len(every), launcher
                    ),
                    _group_launcher(first + place, num_workers, launcher),
                )
                for place, launcher in enumerate(every)
            ]
    return _launchers_of_workers[strategy][replica._replica_id]


def _group_launcher(
    group_key: int,
    group_size: int,
    launcher: "cross_device_utils.CollectiveReplicaLauncher",
) -> "cross_device_utils.CollectiveReplicaLauncher":
    """Makes a launcher like the given one for another group of replicas."""
    device = launcher._device
    keys = cross_device_utils.CollectiveKeys(group_key_start=group_key)
    of_group = cross_device_utils.CollectiveReplicaLauncher(
        keys.get_group_key([device]),
        group_size,
        keys,
        device,
        launcher._options,
    )
    # The groups share the token, because collectives of several groups must
    # start in one order on all devices: NCCL lets a collective block the
    # collectives behind it.
    of_group._ordering_token = launcher._ordering_token
    # A device runs its collectives of all groups in one order.
    if hasattr(launcher, _COUNTER):
        _count_in_loops(of_group, getattr(launcher, _COUNTER))
    return of_group
