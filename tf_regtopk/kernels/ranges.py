"""Consecutive integers as a tensor."""

import tensorflow as tf

_ROW = 1024


def range_from(start, size):
    """`tf.range(start, start + size)` for a `start` known at run time only.

    TensorFlow gives XLA a range, and whatever else does not depend on an input,
    as a literal of that many numbers; this one XLA computes as it goes.

    Args:
        start: Scalar int32 tensor.
        size: Python integer.

    Returns:
        int32 tensor `[size]`.

    Example:

    >>> range_from(tf.constant(2), 3).numpy()
    array([2, 3, 4], dtype=int32)
    """
    first_of_row = start + _ROW * tf.range(-(-size // _ROW))
    rows = first_of_row[:, tf.newaxis] + tf.range(min(size, _ROW))
    return tf.reshape(rows, [-1])[:size]
