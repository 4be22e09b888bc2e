"""Private keys of `tf.distribute`'s collectives: who meets, and for what.

A group key says which devices meet, an instance key which collective of theirs.
TensorFlow never forgets the devices and the shape that belong to a key.
"""

import itertools
import threading
import weakref

import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.ops import resource_variable_ops

# Group keys are far from TensorFlow's, which count up from 1, and from those of
# `neighbours.py`.
FIRST_GROUP_KEY_OF_WORKERS = 1 << 20
_FIRST_GROUP_KEY_OF_STRATEGIES = 1 << 24
# Instance keys for a strategy. Those of 100 strategies are below the next ones.
NUM_INSTANCE_KEYS = 1 << 22
# Instance keys in loops are far from TensorFlow's, and from the largest int32.
# Two series, because both kinds of launchers may serve the same group.
FIRST_INSTANCE_KEYS = (1 << 29, 3 << 28)
COUNTER = "_tf_regtopk_counter"


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
    for first_key, name in zip(FIRST_INSTANCE_KEYS, names, strict=True):
        collectives = getattr(strategy.extended, name, None)
        for launcher in getattr(collectives, "_launchers", ()):
            if not hasattr(launcher, COUNTER):
                with tf.init_scope(), tf.device("CPU:0"):
                    # This class, as for the launcher's own variable, because
                    # the strategy in scope would make one for each replica.
                    counter = resource_variable_ops.ResourceVariable(
                        first_key, dtype=tf.int32, trainable=False
                    )
                setattr(launcher, COUNTER, counter)
                _count_in_loops(launcher, counter)


_strategy_numbers = itertools.count()
_lock = threading.Lock()
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
        devices, (1 + number % 100) * NUM_INSTANCE_KEYS
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


def group_launcher(
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
    if hasattr(launcher, COUNTER):
        _count_in_loops(of_group, getattr(launcher, COUNTER))
    return of_group
