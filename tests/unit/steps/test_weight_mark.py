"""Marks of step and weights, and replicas that have drifted apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.steps import weight_mark


def word_of(arrays, step=0):
    return int(weight_mark.mark([tf.constant(a) for a in arrays], step))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_any_bit_of_any_weight_counts(dtype):
    rng = np.random.default_rng(0)
    dtype = tf.as_dtype(dtype).as_numpy_dtype
    arrays = [
        rng.standard_normal(shape).astype(dtype) for shape in [(3, 5), (7,), ()]
    ]
    same = word_of(arrays)
    assert same == word_of(arrays)
    assert same != word_of(arrays, step=1)
    for i, array in enumerate(arrays):
        for place in range(array.size):
            other = array.copy()
            other.reshape(-1)[place] = np.nextafter(
                other.reshape(-1)[place], dtype(9)
            )
            changed = [*arrays[:i], other, *arrays[i + 1 :]]
            assert word_of(changed) != same
    assert word_of([arrays[0][::-1], *arrays[1:]]) != same


@pytest.mark.parametrize(
    "count, places",
    [(0, []), (1, [0]), (3, [0, 1, 2]), (5, [0, 1, 3, 4]), (10, [0, 3, 6, 9])],
)
def test_sample(count, places):
    small = [keras.Variable(np.zeros(1 + i, "float32")) for i in range(count)]
    others = [
        keras.Variable(np.zeros(shape, dtype))
        for shape, dtype in (
            ((0, 3), "float32"),
            ((129, 128), "float32"),
            (3, "int32"),
        )
    ]
    sampled = weight_mark.sample([*others, *small])
    assert [variable.shape[0] - 1 for variable in sampled] == places


def test_replicas_that_have_drifted_apart_end_with_an_error(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape, "float32")) for shape in [(4, 3), 5]
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5)
        )
        optimizer.build(variables)

    @tf.function
    def step():
        gradients = [tf.ones(variable.shape) for variable in variables]
        strategy.run(lambda: optimizer.apply(gradients, variables))

    step()
    _, second = strategy.experimental_local_results(variables[0].value)
    second.assign(tf.tensor_scatter_nd_add(second, [[2, 1]], [1e-6]))
    before = [variable.numpy() for variable in variables]
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="with the same weights"
    ):
        step()
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    # The first replica's weights for all, as `load_weights` would set them.
    variables[0].assign(variables[0].numpy())
    step()
    assert optimizer.iterations == 2
