"""Private collectives among some of the workers, which TensorFlow has not."""

from collections.abc import Iterable
import threading

import tensorflow as tf
from tensorflow.python.ops import collective_ops

# Far from the keys that TensorFlow counts up from 1, and from those of
# `collectives.py`.
_FIRST_GROUP_KEY = 1 << 22
_FIRST_INSTANCE_KEY = 1 << 30

_lock = threading.Lock()
_group_keys: dict[tuple[int, ...], int] = {}
_next_instance_key = _FIRST_INSTANCE_KEY


def group_keys(groups: Iterable[tuple[int, ...]]) -> list[int]:
    """Returns the keys of groups of workers, the same in each process.

    A key belongs to one group for ever, because TensorFlow never forgets the
    members of a group.

    Args:
        groups: Groups of ranks of workers, in an order that all workers have in
            common. Workers have to ask for the same groups, one call after the
            other, also for those that they are not in.
    """
    with _lock:
        return [
            _group_keys.setdefault(group, _FIRST_GROUP_KEY + len(_group_keys))
            for group in groups
        ]


def take_instance_keys(count: int) -> int:
    """Returns the first of so many keys that belong to the caller.

    TensorFlow never forgets the shape and the dtype that belong to the key of a
    group and of an instance. As for `group_keys`, workers have to call alike.

    Args:
        count: Number of keys, one after the other.
    """
    global _next_instance_key
    with _lock:
        first = _next_instance_key
        _next_instance_key += count
    return first


def exchange_in_group(
    payload: tf.Tensor,
    group_size: tf.Tensor,
    group_key: tf.Tensor,
    instance_key: tf.Tensor,
) -> tf.Tensor:
    """Gives each worker of a group the payloads of all of them.

    Size and keys are tensors, which may differ from step to step, also in loops
    and branches. The same keys may serve again in the step after the next one,
    because a collective ends only when the others have taken what it sends.

    Args:
        payload: Tensor `[length]`, of the same length on every worker.
        group_size: Scalar int32 tensor, at least 2.
        group_key: Scalar int32 tensor, from `group_keys`.
        instance_key: Scalar int32 tensor, from `take_instance_keys`.

    Returns:
        Tensor `[group_size, length]`, in the order of the ranks.
    """
    # The host sends, because NCCL would need a communicator for each group, and
    # could block where groups differ from worker to worker.
    with tf.device("CPU:0"):
        copies = tf.tile(payload[tf.newaxis], [group_size, 1])
        return collective_ops.all_to_all_v2(
            copies, group_size, group_key, instance_key
        )
