"""All steps of a simulation in one program."""

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.kernels import tracing
from tf_regtopk.simulation import descents
from tf_regtopk.simulation import gossip_descent
from tf_regtopk.simulation import of_optimizer

# What the gradients are of, such as the workers' data sets.
Data: TypeAlias = tuple[tf.Tensor, ...]


def gradient_descent(
    descent: of_optimizer.Descent,
    gradients_of: Callable[[tf.Tensor, Data, tf.Tensor], tf.Tensor],
    measure: Callable[[tf.Tensor, Data], tf.Tensor],
    num_steps: int,
    measure_every: int = 1,
) -> Callable[[tf.Tensor, float | tf.Tensor, Data], tf.Tensor]:
    """Makes a function that takes all steps, compiled by XLA.

    It is compiled once, and serves any start, learning rate and data of the
    same shapes, such as those of many seeds.

    Args:
        descent: What `descent_of` returns.
        gradients_of: Function of the weights `[J]` (of `GossipDescent` those
            of each worker, `[N, J]`, or with cross gradients those of another
            one in each row), the data and the number of the step that
            returns the gradients `[N, J]` of the workers' own losses.
        measure: Function of the weights and the data that returns a tensor.
        num_steps: Number of steps.
        measure_every: Number of steps from one measurement to the next, by
            which `num_steps` can be divided.

    Returns:
        Function of the weights `[J]` to start with, the learning rate, and the
        data, a tuple of tensors. It returns `measure` of the weights after each
        step, or after each `measure_every` steps, stacked to a tensor
        `[num_steps / measure_every, ...]`.

    Raises:
        TypeError: If a number of steps is no integer.
        ValueError: If it is less than 1, or if `measure_every` does not divide
            `num_steps`.

    Example:

    >>> # The worker n has the loss ||w - c_n||^2 / 2, and sends one of two
    >>> # entries.
    >>> import keras
    >>> import tf_regtopk
    >>> from tf_regtopk import simulation
    >>> optimizer = tf_regtopk.SparsifiedOptimizer(
    ...     keras.optimizers.SGD(), tf_regtopk.TopK(density=0.5))
    >>> run = gradient_descent(
    ...     simulation.descent_of(optimizer, num_workers=2),
    ...     gradients_of=lambda w, data, t: w - data[0],
    ...     measure=lambda w, data: tf.norm(w - tf.reduce_mean(data[0], 0)),
    ...     num_steps=3)
    >>> centres = tf.constant([[3.0, 0.0], [1.0, 2.0]])
    >>> run(tf.zeros([2]), 0.5, (centres,)).numpy().round(2)
    array([1.35, 0.7 , 0.31], dtype=float32)
    """
    validation.check_integer("num_steps", num_steps, minimum=1)
    validation.check_integer("measure_every", measure_every, minimum=1)
    if num_steps % measure_every:
        raise ValueError(
            "`num_steps` must be a multiple of `measure_every`. Received: "
            f"num_steps={num_steps}, measure_every={measure_every}"
        )

    def step(
        t: tf.Tensor, state: descents.State, rate: tf.Tensor, data: Data
    ) -> tuple[tf.Tensor, descents.State]:
        if isinstance(descent, gossip_descent.GossipDescent):
            gradients, state = descent.gradients(
                state, lambda weights: gradients_of(weights, data, t), t
            )
        else:
            gradients = gradients_of(state.weights, data, t)
        return t + 1, descent.step(state, gradients, t, rate)

    def steps_and_measure(
        t: tf.Tensor,
        state: descents.State,
        measured: tf.Tensor,
        rate: tf.Tensor,
        data: Data,
    ) -> tuple[tf.Tensor, descents.State, tf.Tensor]:
        place = t // measure_every
        end = t + measure_every
        if measure_every == 1:
            t, state = step(t, state, rate, data)
        else:
            t, state = tf.while_loop(
                lambda t, _: t < end,
                lambda t, state: step(t, state, rate, data),
                (t, state),
            )
        measured = tf.tensor_scatter_nd_update(
            measured, [[place]], [measure(state.weights, data)]
        )
        return t, state, measured

    @tracing.compiled
    def take_steps(
        weights: tf.Tensor, rate: tf.Tensor, data: Data
    ) -> tf.Tensor:
        start = descent.initial_state(weights)
        # XLA leaves this out, of which only the shape is read.
        found = measure(start.weights, data)
        return tf.while_loop(
            lambda t, *_: t < num_steps,
            lambda t, state, measured: steps_and_measure(
                t, state, measured, rate, data
            ),
            (
                tf.constant(0),
                start,
                tf.zeros(
                    [num_steps // measure_every, *found.shape], found.dtype
                ),
            ),
        )[-1]

    def run(
        weights: tf.Tensor, learning_rate: float | tf.Tensor, data: Data
    ) -> tf.Tensor:
        weights = tf.convert_to_tensor(weights)
        if tf.is_tensor(learning_rate):
            rate = tf.cast(learning_rate, weights.dtype)
        else:  # A cast would round it to float32 before.
            rate = tf.constant(learning_rate, weights.dtype)
        return take_steps(weights, rate, data)

    return run
