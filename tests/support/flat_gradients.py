"""Steps of an optimizer on gradients given as flat arrays, one a replica."""

import numpy as np
import tensorflow as tf


def step_function(strategy, optimizer, variables):
    """A function that takes a step with gradients `[N, J]`.

    Args:
        strategy: The `tf.distribute.Strategy` of the optimizer.
        optimizer: Keras optimizer.
        variables: List of Keras variables of one dtype, J entries in all.
    """
    shapes = [tuple(v.shape) for v in variables]
    sizes = [int(np.prod(shape)) for shape in shapes]
    dtype = variables[0].dtype

    @tf.function(autograph=False)
    def step(flat):
        def replica_step(flat):
            parts = tf.split(flat, sizes)
            optimizer.apply(
                [tf.reshape(p, s) for p, s in zip(parts, shapes, strict=True)],
                variables,
            )

        strategy.run(replica_step, args=(flat,))

    def take_step(gradients):
        step(
            strategy.experimental_distribute_values_from_function(
                lambda ctx: tf.constant(
                    gradients[ctx.replica_id_in_sync_group], dtype
                )
            )
        )

    return take_step


def flat_weights(variables):
    """All weights in one array `[J]`."""
    return np.concatenate([v.numpy().ravel() for v in variables])
