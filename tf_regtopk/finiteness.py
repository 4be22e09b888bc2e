"""Whether a step's numbers are numbers, on every replica."""

import tensorflow as tf


def largest_magnitude(values):
    """The largest |value|; NaN if any of them is NaN.

    By bit patterns, because what the maximum of a NaN is depends on the device.

    Args:
        values: float32 or float64 tensor of any shape.

    Returns:
        Scalar tensor of the dtype of `values`.

    Example:

    >>> largest_magnitude(tf.constant([-3.0, 2.0])).numpy()
    np.float32(3.0)
    """
    integer = tf.int64 if values.dtype == tf.float64 else tf.int32
    patterns = tf.bitcast(values, integer) & integer.max
    return tf.bitcast(tf.reduce_max(patterns), values.dtype)


def is_sum_finite(magnitudes):
    """Whether no sum of one value of each replica can be NaN or infinite.

    Args:
        magnitudes: Float tensor `[N]`, each replica's `largest_magnitude`.

    Returns:
        Scalar bool tensor.
    """
    return tf.math.is_finite(tf.reduce_sum(magnitudes))


def are_finite(tensors):
    """Whether all `tensors` (or values of `tf.IndexedSlices`) are finite."""
    values = [getattr(tensor, "values", tensor) for tensor in tensors]
    return tf.reduce_all(
        [tf.reduce_all(tf.math.is_finite(v)) for v in values]
        + [tf.constant(True)]
    )
