"""Consecutive integers, and zeros that keep literals out of programs."""

import tensorflow as tf

_ROW = 1024


def opaque_zero(tensor: int | tf.Tensor) -> tf.Tensor:
    """Returns an int32 scalar 0 that TensorFlow does not know.

    TensorFlow's bridge to XLA turns whatever depends on no input into a literal
    of the program: `tf.range(1 << 20)` becomes a million numbers. A range that
    starts at this 0 stays an operation, so that the program stays small (8 kB
    instead of 3 MB) and compiles in little time. XLA folds the 0 later, and
    computes the range while it is used.

    Args:
        tensor: Any scalar integer that depends on an input.

    Returns:
        Scalar int32 tensor.

    Example:

    >>> int(opaque_zero(tf.constant(7)))
    0
    """
    return tf.cast(tensor, tf.int32) * 0


def run_time_zero(tensor: int | tf.Tensor) -> tf.Tensor:
    """Returns an int32 scalar 0 that neither TensorFlow nor XLA knows.

    XLA folds an `opaque_zero` and all that depends on nothing else, except for
    a range. If that takes a scatter or a sum, its result is a literal of the
    executable: 3 MB for the groups of 2^24 scores.

    Args:
        tensor: Scalar integer that depends on an input and is not negative,
            which XLA does not know.

    Returns:
        Scalar int32 tensor.

    Example:

    >>> int(run_time_zero(tf.constant(7)))
    0
    """
    return tf.cast(tf.minimum(tensor, 0), tf.int32)


def range_from(start: tf.Tensor, size: int) -> tf.Tensor:
    """Returns `tf.range(start, start + size)` for a `start` of run time.

    XLA computes the range while it is used, because `start` depends on an
    input: see `opaque_zero` for ranges that start at 0.

    Args:
        start: Scalar int32 tensor.
        size: Number of integers.

    Returns:
        int32 tensor `[size]`.

    Example:

    >>> range_from(tf.constant(2), 3).numpy()
    array([2, 3, 4], dtype=int32)
    """
    first_of_row = start + _ROW * tf.range(-(-size // _ROW))
    rows = first_of_row[:, tf.newaxis] + tf.range(min(size, _ROW))
    return tf.reshape(rows, [-1])[:size]
