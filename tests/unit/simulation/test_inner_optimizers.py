"""The inner optimizers of a simulation take Keras's steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk import simulation


@pytest.mark.parametrize(
    "inner, optimizer",
    [
        (simulation.MomentumSGD(0.75), keras.optimizers.SGD(0.5, 0.75)),
        (simulation.Adam(), keras.optimizers.Adam(0.5)),
    ],
)
def test_inner_optimizers(inner, optimizer):
    variable = keras.Variable(np.zeros(6), dtype="float64")
    w, arrays = np.zeros(6), (tf.zeros(6, tf.float64),) * inner.num_arrays
    for t, g in enumerate(np.random.default_rng(0).standard_normal((5, 6))):
        rate = 0.5 / (t + 1)  # A momentum of SGD keeps the rates of before.
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(g)], [variable])
        change, arrays = inner(arrays, tf.constant(g), tf.constant(t), rate)
        w -= change
        np.testing.assert_allclose(variable.numpy(), w, rtol=1e-5)
