"""Branches that all replicas take together."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def call_on_all_replicas(
    condition: tf.Tensor,
    if_true: Callable[..., None],
    if_false: Callable[[], None],
    args: tuple[Any, ...],
) -> None:
    """Calls one of two functions on every replica, in its replica context.

    To be called in a replica context. The branch is taken outside of it,
    because within a branch the replicas could not meet: TensorFlow refuses a
    `merge_call` there, which Keras's optimizers make.

    Args:
        condition: Scalar bool tensor, the same on every replica.
        if_true: Function of `args`, without a result.
        if_false: Function of no arguments, without a result.
        args: Tuple of structures of tensors of this replica.
    """

    def branch(
        strategy: tf.distribute.Strategy,
        condition: tf.Tensor,
        tensors: tuple[tf.Tensor, ...],
    ) -> None:
        condition = strategy.experimental_local_results(condition)[0]

        def call_if_true(*tensors: tf.Tensor) -> None:
            if_true(
                *tf.nest.pack_sequence_as(args, tensors, expand_composites=True)
            )

        def call(
            function: Callable[..., None], tensors: Sequence[tf.Tensor] = ()
        ) -> None:
            strategy.extended.call_for_each_replica(function, args=tensors)

        tf.cond(
            condition,
            lambda: call(call_if_true, tensors),
            lambda: call(if_false),
        )

    tensors = tf.nest.flatten(args, expand_composites=True)
    tf.distribute.get_replica_context().merge_call(
        branch, args=(condition, tuple(tensors))
    )
