"""TensorFlow still tells how it executes."""

import tensorflow as tf
from tensorflow.python.framework import config

from tf_regtopk import keras_internals


def test_xla_context():
    seen = []

    def look():
        seen.append(keras_internals.in_xla_context())
        return tf.constant(0)

    look()
    tf.function(look)()
    tf.function(look, jit_compile=True)()
    tf.function(lambda: tf.function(look)(), jit_compile=True)()
    assert seen == [False, False, True, True]


def test_op_determinism():
    assert not keras_internals.is_op_determinism_enabled()
    tf.config.experimental.enable_op_determinism()
    try:
        assert keras_internals.is_op_determinism_enabled()
    finally:
        config.disable_op_determinism()
    assert not keras_internals.is_op_determinism_enabled()
