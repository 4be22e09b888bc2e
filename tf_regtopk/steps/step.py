"""One training step, as every replica takes it."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_regtopk.distribute import branches
from tf_regtopk.error_feedback import Progress
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import partition as partition_lib
from tf_regtopk.steps import verdict


def take_step(
    partition: partition_lib.Partition,
    gradients: Sequence[flat_buffer.Gradient],
    progress: Progress,
    is_current: tf.Tensor,
    apply: Callable[[Sequence[flat_buffer.Gradient]], None],
    skip: Callable[[], None],
) -> tf.Tensor:
    """Exchanges gradients, and applies their sum on all replicas or on none.

    A step has two halves, because the entries of the other replicas arrive
    between them, and because nothing that a replica keeps may change before all
    replicas know that the step is taken.

    To be called in a replica context.

    Args:
        partition: `Partition`, by which each gradient is exchanged.
        gradients: This replica's gradient of each variable, or None.
        progress: `Progress`.
        is_current: Scalar bool tensor, True if the function that takes the step
            was traced after the last change.
        apply: Function of the gradients to apply, one for each variable or
            None.
        skip: Function to be called instead if a number is not finite.

    Returns:
        Scalar bool tensor, True if the step was taken, the same on every
        replica.
    """
    has_gradient = [gradient is not None for gradient in gradients]

    # The first half keeps nothing, because a replica may still refuse the step.
    flags, exchanged = partition.exchange(gradients, progress)
    flags.append(verdict.Flags(are_current=is_current))
    with tf.name_scope("tf_regtopk/check"):
        is_taken = verdict.is_taken(flags)

    # The second half changes state and weights, now that all take the step.
    def settle(
        exchanged: tuple[Any, ...], progress: Sequence[tf.Tensor]
    ) -> None:
        apply(partition.aggregate(exchanged, has_gradient, Progress(*progress)))

    # The branch is outside of the replicas, which could not meet inside of it.
    branches.call_on_all_replicas(
        is_taken, settle, lambda *_: skip(), (exchanged, tuple(progress))
    )
    return is_taken
