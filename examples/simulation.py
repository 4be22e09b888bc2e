"""Sparsified gradient descent of many workers in one compiled program.

The same functions that `tf_regtopk.SparsifiedOptimizer` compiles for each
replica, called for one worker after the other: for small problems, of which the
exchange between replicas would take all the time.
"""

from typing import NamedTuple

import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.steps import round as round_lib


class MomentumSGD(NamedTuple):
    """`v = momentum v + g`, and the weights follow v.

    Args:
        momentum: Float in [0, 1).
    """

    momentum: float = 0.0
    num_arrays = 1  # Of the weights' size, that it keeps.

    def __call__(self, arrays, g, t):
        """What to subtract from the weights, in units of the learning rate.

        Args:
            arrays: Tuple of what it keeps; zeros at first.
            g: Float tensor `[J]`.
            t: Scalar int32 tensor, the number of steps before.

        Returns:
            `(change, arrays)`.
        """
        del t
        v = self.momentum * arrays[0] + g
        return v, (v,)


class Adam(NamedTuple):
    """As `keras.optimizers.Adam`, and called as `MomentumSGD`.

        m = beta_1 m + (1 - beta_1) g,      v = beta_2 v + (1 - beta_2) g^2
        change = sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)) m / (sqrt(v) + eps)

    Args:
        beta_1: Float in [0, 1).
        beta_2: Float in [0, 1).
        epsilon: Positive float.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    num_arrays = 2

    def __call__(self, arrays, g, t):
        m, v = arrays
        m = self.beta_1 * m + (1 - self.beta_1) * g
        v = self.beta_2 * v + (1 - self.beta_2) * g**2
        power = tf.cast(t + 1, g.dtype)
        scale = tf.sqrt(1 - self.beta_2**power) / (1 - self.beta_1**power)
        return scale * m / (tf.sqrt(v) + self.epsilon), (m, v)


class State(NamedTuple):
    """What a step changes.

    Args:
        weights: Float tensor `[J]`.
        arrays: Tuple of what the inner optimizer keeps.
        local: Tuple of float tensors `[N, J]`, the workers' own of the error
            feedback.
        shared: Tuple of tensors, those that the workers share.
        memory: Tuple of tensors `[N, ...]`, what the sparsifier remembers.
    """

    weights: tf.Tensor
    arrays: tuple
    local: tuple = ()
    shared: tuple = ()
    memory: tuple = ()


class DenseDescent(NamedTuple):
    """Steps with the mean of the workers' gradients, as `SparseDescent`."""

    inner: MomentumSGD | Adam

    def initial_state(self, weights):
        return State(weights, (tf.zeros_like(weights),) * self.inner.num_arrays)

    def step(self, state, gradients, t, rate):
        aggregate = tf.reduce_mean(gradients, axis=0)
        change, arrays = self.inner(state.arrays, aggregate, t)
        return State(state.weights - rate * change, arrays)


class SparseDescent(NamedTuple):
    """Steps with the sum of the entries that the workers send.

    Args:
        sparsifier: `tf_regtopk.Sparsifier`.
        error_feedback: `tf_regtopk.ErrorFeedback`.
        codec: `tf_regtopk.Codec`.
        num_workers: N.
        inner: `MomentumSGD` or `Adam`.
    """

    sparsifier: tf_regtopk.Sparsifier
    error_feedback: tf_regtopk.ErrorFeedback
    codec: tf_regtopk.Codec
    num_workers: int
    inner: MomentumSGD | Adam

    def initial_state(self, weights):
        """`State` before the first step, with these weights `[J]`."""
        size, dtype = weights.shape[0], weights.dtype
        k = self.sparsifier.num_selected(size)

        def for_each_worker(values):
            return tuple(
                tf.stack([value] * self.num_workers) for value in values
            )

        return State(
            weights,
            (tf.zeros_like(weights),) * self.inner.num_arrays,
            for_each_worker(self.error_feedback.initial_local(size, dtype)),
            self.error_feedback.initial_shared(size, dtype),
            for_each_worker(self.sparsifier.initial_memory(k, size, dtype)),
        )

    def step(self, state, gradients, t, rate):
        """The state after a step.

        Args:
            state: `State` before it.
            gradients: Float tensor `[N, J]`, those of the workers' own losses.
            t: Scalar int32 tensor, the number of steps before.
            rate: Scalar float tensor, the learning rate.
        """
        size, dtype = state.weights.shape[0], state.weights.dtype
        k = self.sparsifier.num_selected(size)
        method = round_lib.Method(
            self.sparsifier,
            self.error_feedback,
            self.codec.payload(k, size, dtype),
            (selection.Group(size, k),),
        )
        context = error_feedback_lib.Step(self.num_workers, k / size, rate, t)

        def send(of_worker):
            rank, gradient, local, memory = of_worker
            before = round_lib.State(local, state.shared, memory)
            return round_lib.send(method, gradient, before, context, rank)[1]

        sent = tf.map_fn(
            send,
            (
                tf.range(self.num_workers),
                gradients / self.num_workers,
                state.local,
                state.memory,
            ),
            fn_output_signature=round_lib.Sent(
                tf.TensorSpec([k], tf.int32),
                tf.TensorSpec([k], dtype),
                _specs(state.local),
            ),
        )
        total = scatter_sum.sum_entries(sent.indices, sent.values, size)
        aggregate, shared = round_lib.aggregate(
            method, total, state.shared, context
        )
        local, memory, _ = tf.map_fn(
            # With something to return where nothing is kept.
            lambda of_worker: (
                *round_lib.settle(method, *of_worker, total, context),
                of_worker[0].indices,
            ),
            (sent, state.memory),
            fn_output_signature=(
                _specs(state.local),
                _specs(state.memory),
                tf.TensorSpec([k], tf.int32),
            ),
        )
        change, arrays = self.inner(state.arrays, aggregate, t)
        weights = state.weights - rate * change
        return State(weights, arrays, local, shared, memory)


def gradient_descent(
    gradients_of,
    measure,
    sparsifier,
    error_feedback,
    codec,
    num_workers,
    num_steps,
    inner,
):
    """A function that takes steps of an inner optimizer with the aggregate.

    Args:
        gradients_of: Function of the weights `[J]`, the data and the number of
            the step that returns the gradients `[N, J]` of the workers' own
            losses.
        measure: Function of the weights and the data that returns a scalar.
        sparsifier: As of `SparseDescent`, and so the next three.
        error_feedback: See above.
        codec: See above.
        num_workers: See above.
        num_steps: Number of steps.
        inner: `MomentumSGD` or `Adam`.

    Returns:
        Function of the weights `[J]` to start with, the learning rate, and the
        data, a tuple of tensors. It returns `measure` of the weights after each
        step, a float tensor `[num_steps]`.
    """
    descent = SparseDescent(
        sparsifier, error_feedback, codec, num_workers, inner
    )

    def step(t, state, measured, rate, data):
        gradients = gradients_of(state.weights, data, t)
        state = descent.step(state, gradients, t, rate)
        measured = tf.tensor_scatter_nd_update(
            measured, [[t]], [measure(state.weights, data)]
        )
        return t + 1, state, measured

    @tf.function(jit_compile=True, autograph=False)
    def run(weights, learning_rate, data):
        rate = tf.cast(learning_rate, weights.dtype)
        return tf.while_loop(
            lambda t, *_: t < num_steps,
            lambda *loop: step(*loop, rate, data),
            (
                tf.constant(0),
                descent.initial_state(weights),
                tf.zeros([num_steps], weights.dtype),
            ),
        )[-1]

    return run


def _specs(values):
    """What each worker has of tensors `[N, ...]`."""
    return tuple(tf.TensorSpec(v.shape[1:], v.dtype) for v in values)
