"""Private collectives among some of the workers, which TensorFlow has not."""

from collections.abc import Iterable
import threading
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.ops import collective_ops

# Far from the keys that TensorFlow counts up from 1, and from those of
# `collectives.py`.
_FIRST_GROUP_KEY = 1 << 22
_FIRST_INSTANCE_KEY = 1 << 30

_lock = threading.Lock()
_group_keys: dict[tuple[int, ...], int] = {}
_next_instance_key = _FIRST_INSTANCE_KEY


class Link(NamedTuple):
    """A pair of workers, of which one sends to the other.

    Args:
        group_key: Scalar int32 tensor, from `group_keys`.
        instance_key: Scalar int32 tensor, from `take_instance_keys`, of this
            direction only.
    """

    group_key: tf.Tensor
    instance_key: tf.Tensor


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
    payloads: tf.Tensor,
    group_size: tf.Tensor,
    group_key: tf.Tensor,
    instance_key: tf.Tensor,
) -> tf.Tensor:
    """Gives each worker of a group what each of them has for that worker.

    Size and keys are tensors, which may differ from step to step, also in loops
    and branches. The same keys may serve again in the step after the next one,
    because a collective ends only when the others have taken what it sends.

    Args:
        payloads: Tensor `[group_size, length]`, of the same length on every
            worker: the rows are for the workers in the order of their names
            (as texts, so that task 10 comes before task 2).
        group_size: Scalar int32 tensor, at least 2.
        group_key: Scalar int32 tensor, from `group_keys`.
        instance_key: Scalar int32 tensor, from `take_instance_keys`.

    Returns:
        Tensor `[group_size, length]`, in the same order.
    """
    # The host sends, because NCCL would need a communicator for each group, and
    # could block where groups differ from worker to worker.
    with tf.device("CPU:0"):
        return collective_ops.all_to_all_v2(
            payloads, group_size, group_key, instance_key
        )


def pass_on(payload: tf.Tensor, to: Link, before: Link) -> tf.Tensor:
    """Sends a payload to one worker, and receives that of another.

    The keys are tensors as those of `exchange_in_group`. All workers of a cycle
    have to call at the same time.

    Args:
        payload: Tensor `[length]`, of the same length on every worker.
        to: `Link` to the worker that receives.
        before: `Link` to the worker that sends, which may be the same.

    Returns:
        Tensor `[length]`, the payload of the worker `before`.
    """
    # Both at the same time, because a worker that has sent goes on when the
    # other one has received.
    with tf.device("CPU:0"):
        sent = collective_ops.broadcast_send_v2(
            payload, 2, to.group_key, to.instance_key
        )
        received = collective_ops.broadcast_recv_v2(
            payload.shape.as_list(),
            payload.dtype,
            2,
            before.group_key,
            before.instance_key,
        )
        with tf.control_dependencies([sent]):
            return tf.identity(received)
