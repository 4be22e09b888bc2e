"""Codecs as compiled functions."""

import tensorflow as tf

STREAM = (0, 0)  # A step and a replica.


def compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)
