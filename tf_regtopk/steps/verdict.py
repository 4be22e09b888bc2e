"""The verdict on a step, taken or skipped: the host's one decision.

What a replica finds out about a step are flags on its own device. They travel
to the host together, because the host waits for each copy from a device.
"""

from collections.abc import Sequence
import itertools
import sys
from typing import NamedTuple

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import branches
from tf_regtopk.distribute import strategy as strategy_lib


class Flags(NamedTuple):
    """Findings of a replica: bool tensors, true where all is well, or None.

    Args:
        are_finite: Whether no gradient or sum holds NaN or infinity; if not,
            the step is skipped.
        are_alike: For each replica, whether it is at the same step, with the
            same weights.
        are_valid: For each replica, whether its payload held k entries.
        are_current: Whether the function was traced after the last change.
    """

    are_finite: tf.Tensor | None = None
    are_alike: tf.Tensor | None = None
    are_valid: tf.Tensor | None = None
    are_current: tf.Tensor | None = None


def is_taken(flags: Sequence[Flags]) -> tf.Tensor:
    """Returns whether all replicas take the step; raises if they cannot.

    Args:
        flags: List of `Flags`, the same on every replica.

    Returns:
        Scalar bool tensor in the memory of the host, True if all is finite.
        Where XLA compiles the whole step, which then cannot raise, False also
        if the function was traced before the exchange changed.

    Raises:
        tf.errors.InvalidArgumentError: When run, if replicas are at different
            steps, a payload held no k entries of the gradient, or the function
            was traced before the exchange changed.
    """
    columns = [
        [tf.reshape(flag, [-1]) for flag in column if flag is not None]
        for column in zip(*flags, strict=True)
    ]
    sizes = [sum(flag.shape[0] for flag in column) for column in columns]
    vector = tf.concat([*itertools.chain(*columns)], axis=0)
    with tf.device("CPU:0"):
        found = Flags(*tf.split(tf.identity(vector), sizes))
        checks = [
            _assert(
                tf.reduce_all(found.are_current),
                "A function must be traced again when the density or the "
                "exchange changes, as by "
                "`model.make_train_function(force=True)`. Received: a function "
                "traced before the last change",
            ),
            _assert(
                tf.reduce_all(found.are_alike),
                "The replicas must be at the same step, with the same weights. "
                "Were the workers restored from different checkpoints, or were "
                "weights set on one of them only? Or do their processors or "
                "versions round differently? Received replicas that agree with "
                "this one:",
                found.are_alike,
            ),
            # Payloads of another step say nothing.
            _assert(
                tf.reduce_all(found.are_valid)
                | ~tf.reduce_all(found.are_alike),
                "Every payload must hold different, rising indices of the "
                "gradient. Do all workers run the same model and optimizer? "
                "Received valid payloads of the replicas:",
                found.are_valid,
            ),
        ]
        # The result waits for the checks, because a graph could go on beside a
        # check that fails.
        with tf.control_dependencies([c for c in checks if c is not None]):
            is_taken = tf.identity(tf.reduce_all(found.are_finite))
        if keras_internals.in_xla_context():
            # XLA drops the checks; of a single replica all others hold.
            is_taken &= tf.reduce_all(found.are_current)
        return is_taken


def tell_of_first_skip(num_skipped: tf.Tensor) -> None:
    """Prints the usual causes, on the first replica, before the first skip.

    To be called in a replica context.

    Args:
        num_skipped: Scalar integer tensor, the steps skipped so far.
    """
    if not branches.may_be_first_replica():
        return
    if keras_internals.in_xla_context():
        return  # A program that XLA compiles as a whole cannot print.
    rank = strategy_lib.replica_rank()

    def tell() -> tf.Tensor:
        tf.print(
            "WARNING:tf_regtopk: A step is skipped on all replicas, because "
            "the gradient of some replica holds NaN or infinity (or their sum "
            "might). Usual causes: a batch that leaves a replica without "
            "samples, of which BatchNormalization makes NaN "
            "(`drop_remainder=True` avoids such batches); a learning rate that "
            "is too high; float16 without `tf_regtopk.LossScaleOptimizer`. "
            "`optimizer.skipped_steps` counts the steps; this is said once.",
            output_stream=sys.stderr,
        )
        return tf.constant(True)

    tf.cond(
        tf.equal(rank, 0) & tf.equal(num_skipped, 0),
        tell,
        lambda: tf.constant(False),
    )


def _assert(
    condition: tf.Tensor, *data: tf.Tensor | str
) -> tf.Operation | None:
    # The raw operation is called, because the public function adds a branch.
    return tf.raw_ops.Assert(condition=condition, data=[*data], summarize=1000)
