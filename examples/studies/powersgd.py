"""PowerSGD, the compression to a low rank that PyTorch ships, for comparisons.

A worker's gradient of a matrix plus its residual error, M, is sent as two thin
matrices, each summed by an all-reduce:

    P = orthonormal columns of mean M Q,    Q = mean M^T P
    aggregate = P Q^T,                      e = M - aggregate

Q is that of the step before. Vectors, and matrices that two thin ones would not
make smaller, are summed as they are. Simulated only.

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient
Compression for Distributed Optimization" (2019), algorithms 1 and 2.
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation

# Of the norm of a column, lest an empty one is divided by 0.
_EPSILON = 1e-8


class PowerSGD(keras.optimizers.SGD):
    """The name of the method; `descent_of` has its steps.

    Args:
        learning_rate: Positive float.
        momentum: Float in [0, 1), after the sum.
        rank: Positive integer, the rank of the aggregate of a matrix.
    """

    def __init__(self, learning_rate, momentum, rank):
        super().__init__(learning_rate, momentum)
        self.rank = rank

    def update_step(self, gradient, variable, learning_rate):
        raise NotImplementedError(
            "`PowerSGD` must be simulated: it has no exchange of its own. "
            "Received: a training"
        )


class PowerDescent(NamedTuple):
    """Steps with the workers' mean gradient, compressed to a low rank.

    Args:
        inner: `simulation.MomentumSGD`.
        shapes: Tuple of the shapes of the variables.
        rank: Positive integer.
        num_workers: N.
    """

    inner: simulation.MomentumSGD
    shapes: tuple
    rank: int
    num_workers: int

    def initial_state(self, weights):
        """`State` before the first step, with these weights `[J]`."""
        factors = tuple(
            tf.random.stateless_normal(
                [matrix[1], self._rank_of(matrix)],
                [0, i],
                dtype=weights.dtype,
            )
            for i, matrix in enumerate(map(matrix_of, self.shapes))
            if self._is_compressed(matrix)
        )
        return simulation.State(
            weights,
            (tf.zeros_like(weights),) * self.inner.num_arrays,
            (tf.stack([tf.zeros_like(weights)] * self.num_workers),),
            factors,
        )

    def step(self, state, gradients, t, rate):
        """The state after a step, as of `simulation.SparseDescent`."""
        [residual], factors = state.local, list(state.shared)
        sizes = [math.prod(shape) for shape in self.shapes]
        aggregates, errors, new_factors = [], [], []
        for a, shape in zip(
            tf.split(gradients + residual, sizes, axis=1),
            self.shapes,
            strict=True,
        ):
            matrix = matrix_of(shape)
            aggregate = tf.reduce_mean(a, axis=0)
            # What is sent whole leaves no error.
            error = tf.zeros_like(a)
            if self._is_compressed(matrix):
                m = tf.reshape(a, [-1, *matrix])
                p, q = compress(m, factors.pop(0))
                new_factors.append(q)
                aggregate = tf.reshape(p @ tf.transpose(q), [-1])
                error = a - aggregate
            aggregates.append(aggregate)
            errors.append(error)
        change, arrays = self.inner(
            state.arrays, tf.concat(aggregates, 0), t, rate
        )
        return simulation.State(
            state.weights - change,
            arrays,
            (tf.concat(errors, 1),),
            tuple(new_factors),
        )

    def sent_bytes(self, size):
        """Counts the bytes that each worker would send per step, in rings.

        Args:
            size: J.
        """
        del size  # It is that of the shapes.
        numbers = 0
        for shape in self.shapes:
            matrix = matrix_of(shape)
            numbers += (
                self._rank_of(matrix) * sum(matrix)
                if self._is_compressed(matrix)
                else math.prod(shape)
            )
        return tf_regtopk.AllReduce().sent_bytes(
            4 * numbers, tf_regtopk.Cluster(self.num_workers)
        )

    def _rank_of(self, matrix):
        return min(self.rank, *matrix)

    def _is_compressed(self, matrix):
        return self._rank_of(matrix) * sum(matrix) < math.prod(matrix)


def matrix_of(shape):
    """The rows and columns of a variable: its last axis has the columns.

    >>> matrix_of((3, 3, 16, 32)), matrix_of((64,))
    ((144, 32), (1, 64))
    """
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def compress(m, q):
    """The two thin matrices whose product stands for the mean of matrices.

    Args:
        m: Float tensor `[N, rows, columns]`, those of the workers.
        q: Float tensor `[columns, rank]`, that of the step before.

    Returns:
        `(p, q)`, float tensors `[rows, rank]` and `[columns, rank]`.
    """
    p = orthonormal(tf.reduce_mean(m @ q, axis=0))
    q = tf.reduce_mean(tf.matmul(m, p, transpose_a=True), axis=0)
    return p, q


def orthonormal(p):
    """The columns of a matrix `[rows, rank]`, by Gram and Schmidt."""
    columns = []
    for column in tf.unstack(p, axis=1):
        for other in columns:
            column -= tf.reduce_sum(column * other) * other
        columns.append(column / (tf.norm(column) + _EPSILON))
    return tf.stack(columns, axis=1)


def descent_of(optimizer, num_workers, shapes):
    """`simulation.descent_of`, and the steps of `PowerSGD`.

    Args:
        optimizer: As of `simulation.descent_of`, or `PowerSGD`.
        num_workers: N.
        shapes: The shapes of the variables.
    """
    if not isinstance(optimizer, PowerSGD):
        return simulation.descent_of(optimizer, num_workers)
    return PowerDescent(
        simulation.MomentumSGD(optimizer.momentum),
        tuple(tuple(shape) for shape in shapes),
        optimizer.rank,
        num_workers,
    )


def _method(rank):
    def make(hyper):
        if hyper.adam:
            raise ValueError(
                "`inner_optimizer` must be sgd for PowerSGD. Received: adam"
            )
        return PowerSGD(hyper.learning_rate, hyper.momentum, rank)

    return make


METHODS = {f"powersgd{rank}": _method(rank) for rank in (1, 4)}
