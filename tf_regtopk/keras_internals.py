"""The private parts of Keras and TensorFlow that this package relies on.

Members that Keras's own optimizers use of their base class do not count.
Nothing public serves in place of these parts; each part has a test that fails
when upstream changes it.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
import operator
import threading
from typing import Any
import weakref

import keras
import tensorflow as tf
from tensorflow.python.checkpoint import restore
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.eager import context
from tensorflow.python.framework import config
from tensorflow.python.ops import collective_ops
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops import resource_variable_ops

# What is looked up by name in upstream's classes and modules.
_NEEDED = (
    (keras.optimizers.Optimizer, "_all_reduce_sum_gradients"),
    (keras.optimizers.Optimizer, "_clip_gradients"),
    (cross_device_utils, "CollectiveKeys.get_group_key"),
    (cross_device_utils, "CollectiveKeys.get_instance_key"),
    (cross_device_utils, "CollectiveReplicaLauncher.batch_all_reduce"),
    (cross_device_utils, "CollectiveReplicaLauncher._next_instance_key"),
    (cross_device_utils, "CollectiveReplicaLauncher._get_ordering_token"),
    (collective_ops, "all_gather_v2"),
    (collective_ops, "all_to_all_v2"),
)


def check_upstream() -> None:
    """Raises if Keras or TensorFlow lacks a part that a step relies on.

    Raises:
        RuntimeError: If a part is missing. Without the first of them gradients
            would be summed twice.
    """
    for owner, path in _NEEDED:
        try:
            operator.attrgetter(path)(owner)
        except AttributeError:
            raise RuntimeError(
                "The installed Keras or TensorFlow must have "
                f"`{owner.__name__}.{path}`, which `tf_regtopk` relies on. "
                "Install versions of the table in README.md, or a newer "
                f"`tf_regtopk`. Received: Keras {keras.__version__}, "
                f"TensorFlow {tf.__version__}"
            ) from None


def take_aggregated_gradients(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes a Keras optimizer take gradients as already summed over replicas.

    Keras sums inside the optimizer, in `_all_reduce_sum_gradients`, after
    clipping and just before the update, and has no switch against the sum. The
    optimizer must be built already, because a `MultiOptimizer` gets its parts
    when it is built.
    """
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        part._all_reduce_sum_gradients = list


def take_clipping(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[Sequence[Any]], list[Any]]:
    """Takes the clipping of gradients out of a Keras optimizer.

    Args:
        optimizer: Optimizer without parts, which clips nothing from now on.

    Returns:
        Function from the list of gradients, with None where there is none, to
        the list of the clipped ones. It follows the optimizer's settings.
    """
    clip = optimizer._clip_gradients
    optimizer._clip_gradients = list

    def clip_present(gradients: Sequence[Any]) -> list[Any]:
        clipped = iter(clip([g for g in gradients if g is not None]))
        return [None if g is None else next(clipped) for g in gradients]

    return clip_present


def variables_of(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Returns the variables for which a Keras optimizer was built."""
    return list(optimizer._trainable_variables)


def replace_optimizer(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> None:
    """Replaces the optimizer of a compiled model, also where it is saved.

    Keras saves what `compile` was given. To call `compile` again would lose the
    state of metrics, and a model may have a `compile` of its own.
    """
    model.optimizer = optimizer
    model._compile_config.config["optimizer"] = optimizer
    model.train_function = None  # It has traced the former optimizer.


# The state of a wrapper has the first name in a `tf.train.Checkpoint`, and had
# the second name in checkpoints of version 0.1.0.
CHECKPOINT_KEY, _FORMER_CHECKPOINT_KEY = "_replica_state", "_checkpointed_state"
CHECKPOINT_KEYS = (CHECKPOINT_KEY, _FORMER_CHECKPOINT_KEY)
_INNER = "inner_optimizer"
# TensorFlow's counter of checkpoints looks like a child of the wrapper if the
# wrapper is the root.
_SAVE_COUNTER = "save_counter"


class CheckpointedAsInner:
    """A part of an optimizer around another one: how checkpoints see it.

    `tf.train.Checkpoint` stores the variables of an object by the names of its
    children. In a checkpoint the children of the wrapper are those of its inner
    optimizer, and a `tf.train.experimental.PythonState` of the wrapper's own.
    So a checkpoint of a plain optimizer fits the wrapper, and the other way
    round. A checkpoint of version 0.1.0 had the wrapper's own variables under
    the names of the inner optimizer's, and the inner optimizer as a child.

    TensorFlow asks for a child by its name alone, and leaves the position of an
    unknown child in `_deferred_dependencies`. Only a position tells which of
    these checkpoints is restored. So every child is unknown at first.
    """

    inner_optimizer: keras.optimizers.Optimizer

    def start_without_state(self) -> None:
        """Starts as if new: what is restored was saved without a wrapper."""

    def checkpoint_children(self) -> dict[str, Any]:
        """Returns the wrapper's own children by their names."""
        return super()._trackable_children()  # type: ignore[misc]

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: Any
    ) -> dict[str, Any]:
        own = super()._trackable_children(save_type, **kwargs)  # type: ignore[misc]
        if save_type != "checkpoint":
            # A SavedModel is written in a graph, where Python can read nothing.
            return {n: c for n, c in own.items() if n != CHECKPOINT_KEY}
        children = dict(
            self.inner_optimizer._trackable_children(save_type, **kwargs)
        )
        if CHECKPOINT_KEY in own:
            children[CHECKPOINT_KEY] = own[CHECKPOINT_KEY]
        return children

    def _lookup_dependency(
        self, name: str, cached_dependencies: dict[str, Any] | None = None
    ) -> Any:
        if cached_dependencies is None:
            return super()._lookup_dependency(name)  # type: ignore[misc]
        return None

    @property
    def _deferred_dependencies(self) -> "_Deferred":
        return _Deferred(super()._deferred_dependencies, self._restore_child)  # type: ignore[misc]

    def _restore_child(
        self, name: str, position: "restore.CheckpointPosition"
    ) -> None:
        """Restores a child of the wrapper from a checkpoint of any kind."""
        checkpoint = position.checkpoint
        node = next(
            checkpoint.object_graph_proto.nodes[i]
            for i, restored in checkpoint.object_by_proto_id.items()
            if restored is self
        )
        saved = {child.local_name for child in node.children}
        inner_children = self.inner_optimizer._trackable_children()
        has_own = CHECKPOINT_KEY in saved
        if not has_own and (
            _FORMER_CHECKPOINT_KEY in saved
            # A custom inner optimizer may itself be around another one.
            or (_INNER in saved and _INNER not in inner_children)
        ):
            own = self.checkpoint_children()
            if name == _FORMER_CHECKPOINT_KEY:
                name = CHECKPOINT_KEY
            pending = super()._deferred_dependencies  # type: ignore[misc]
            child = own.get(name)
        elif name in (CHECKPOINT_KEY, _SAVE_COUNTER):
            pending = super()._deferred_dependencies  # type: ignore[misc]
            child = self.checkpoint_children().get(name)
        else:
            pending = self.inner_optimizer._deferred_dependencies
            child = self.inner_optimizer._lookup_dependency(
                name, inner_children
            )
            if not has_own:
                self._restore_nothing(checkpoint)
        if child is None:
            pending.setdefault(name, []).append(position)
        else:
            position.restore(child)

    def _restore_nothing(self, checkpoint: Any) -> None:
        """Starts without state, once for a checkpoint that has none."""
        if checkpoint.restore_uid == getattr(self, "_started_by", None):
            return
        self._started_by = checkpoint.restore_uid
        self.start_without_state()
        state = self.checkpoint_children().get(CHECKPOINT_KEY)
        if state is not None:
            # So that `assert_existing_objects_matched` counts the state as
            # restored. Numbers of saved objects are never negative.
            checkpoint.object_by_proto_id[-id(state)] = state


class _Deferred:
    """The positions of children that TensorFlow could not find by name."""

    def __init__(
        self,
        pending: dict[str, list["restore.CheckpointPosition"]],
        restore_child: Callable[[str, "restore.CheckpointPosition"], None],
    ) -> None:
        self._pending = pending
        self._restore_child = restore_child

    def setdefault(self, name: str, _: Any) -> "_Positions":
        return _Positions(name, self._restore_child)

    def get(self, name: str, default: Any = None) -> Any:
        return self._pending.get(name, default)

    def pop(self, name: str, default: Any = None) -> Any:
        return self._pending.pop(name, default)


class _Positions:
    """A list of one child's positions, which restores what it gets."""

    def __init__(
        self,
        name: str,
        restore_child: Callable[[str, "restore.CheckpointPosition"], None],
    ) -> None:
        self._name = name
        self._restore_child = restore_child

    def append(self, position: "restore.CheckpointPosition") -> None:
        self._restore_child(self._name, position)


def divide_by_no_zeros(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes Keras's Adafactor take gradients of which most entries are zero.

    Adafactor divides each entry by the root of v = r c / mean(r), in which r
    and c are the means of the squares in its row and in its column. Where all
    of both are 0, v underflows, and 0 / 0 is NaN. Adafactor stores v by the
    public `assign` before it divides, so that a tiny number can take the place
    of 0. Nothing else changes, to the bit.

    The optimizer must be built already, as for `take_aggregated_gradients`.
    """
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        if isinstance(part, keras.optimizers.Adafactor):
            part.assign = functools.partial(_assign_no_zeros, part.assign)


def _assign_no_zeros(
    assign: Callable[[keras.Variable, tf.Tensor], None],
    variable: keras.Variable,
    value: tf.Tensor | tf.IndexedSlices,
) -> None:
    """Calls `assign` with a tiny number in the place of zeros."""
    if not isinstance(value, tf.IndexedSlices):
        # The smallest normal number, because others may be taken for 0.
        tiny = 2.0 ** (-14 if value.dtype == tf.float16 else -126)
        value = tf.where(tf.equal(value, 0), tf.cast(tiny, value.dtype), value)
    assign(variable, value)


def give_back(optimizer: keras.optimizers.Optimizer) -> None:
    """Undoes what the functions above have changed in an optimizer."""
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        for name in ("_all_reduce_sum_gradients", "_clip_gradients", "assign"):
            if name in vars(part):
                delattr(part, name)


def strategy_of(
    optimizer: keras.optimizers.Optimizer,
) -> tf.distribute.Strategy:
    """Returns the strategy in whose scope a Keras optimizer was created."""
    return optimizer._distribution_strategy


def in_xla_context() -> bool:
    """Returns whether XLA will compile the code being traced as a whole."""
    return control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def is_op_determinism_enabled() -> bool:
    """Returns whether TensorFlow's `enable_op_determinism` was called."""
    return config.is_op_determinism_enabled()


@contextlib.contextmanager
def initial_values_of_each_worker() -> Iterator[None]:
    """Keeps the initial values of new variables on the worker that made them.

    Otherwise the first worker sends its initial values to all workers. 44 MB of
    values take 3.5 s at 100 Mbit/s and hold up the heartbeats meanwhile;
    TensorFlow takes a worker for lost after 10 s without a heartbeat.
    """
    extended = tf.distribute.get_strategy().extended
    num_workers = getattr(extended, "_num_workers", None)
    if num_workers is None:
        yield
        return
    extended._num_workers = 1
    try:
        yield
    finally:
        extended._num_workers = num_workers


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
        strategy: The only strategy of its devices in this process, because
            another one would count the same keys.
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
    share = shares[tf.distribute.get_replica_context()._replica_id]
    gathered = _gather(_gather(share, across), within)
    num_replicas, length = shares.shape
    gathered = tf.reshape(gathered, [num_replicas, num_workers, length])
    return tf.transpose(gathered, [1, 0, 2])


def _gather(
    payload: tf.Tensor, launcher: "cross_device_utils.CollectiveReplicaLauncher"
) -> tf.Tensor:
    """Gathers the payloads of a launcher's group, one after the other."""
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
    arguments = [
        launcher._group_size,
        launcher._group_key,
        instance_key,
        options.implementation.value,
        options.timeout_seconds or 0,
        launcher._get_ordering_token(),
    ]
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
