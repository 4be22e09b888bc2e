"""The equations that the rules share."""

import numpy as np
import tensorflow as tf

from tf_regtopk.error_feedback import equations


def test_nothing_is_lost():
    """sent + residual error = accumulated, to the bit."""
    rng = np.random.default_rng(0)
    error, gradient = rng.standard_normal((2, 50)).astype(np.float32)
    a = equations.accumulate(tf.constant(error), tf.constant(gradient))
    indices = tf.constant([3, 49, 0])
    sent = tf.gather(a, indices)
    residual = equations.residual_error(a, indices, sent).numpy()
    assert (residual[[3, 49, 0]] == 0).all()
    residual[[3, 49, 0]] += sent.numpy()
    np.testing.assert_array_equal(residual, error + gradient)
