"""Branches that all replicas take together."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_regtopk.distribute import strategy as strategy_lib


def call_on_all_replicas(
    condition: tf.Tensor,
    if_true: Callable[..., tf.Tensor | None],
    if_false: Callable[..., tf.Tensor | None],
    args: tuple[Any, ...],
) -> tf.Tensor | None:
    """Calls one of two functions on every replica, in its replica context.

    To be called in a replica context. The branch is taken outside of it,
    because within a branch the replicas could not meet: TensorFlow refuses a
    `merge_call` there, which Keras's optimizers make.

    Args:
        condition: Scalar bool tensor, the same on every replica.
        if_true: Function of `args`.
        if_false: Function of `args`.
        args: Tuple of structures of tensors of this replica.

    Returns:
        What the function that was called has returned on the first replica of
        this process: a tensor in the memory of the host, or None.
    """

    def branch(
        strategy: tf.distribute.Strategy,
        condition: tf.Tensor,
        tensors: tuple[tf.Tensor, ...],
    ) -> tf.Tensor | None:
        condition = strategy.experimental_local_results(condition)[0]

        def call(function: Callable[..., tf.Tensor | None]) -> tf.Tensor | None:
            def call_packed(*tensors: tf.Tensor) -> tf.Tensor | None:
                return function(
                    *tf.nest.pack_sequence_as(
                        args, tensors, expand_composites=True
                    )
                )

            results = strategy.extended.call_for_each_replica(
                call_packed, args=tensors
            )
            return strategy.experimental_local_results(results)[0]

        return tf.cond(condition, lambda: call(if_true), lambda: call(if_false))

    tensors = tf.nest.flatten(args, expand_composites=True)
    return tf.distribute.get_replica_context().merge_call(
        branch, args=(condition, tuple(tensors))
    )


def may_be_first_replica() -> bool:
    """Returns False in a replica that is known not to be the first one.

    For what one replica is to do, such as printing: a function that is traced
    for each replica needs no operations for the others. On several workers the
    rank may be known only when the function runs.
    """
    if tf.distribute.get_replica_context() is None:
        return True
    return tf.get_static_value(strategy_lib.replica_rank()) in (None, 0)
