"""Tests for NaN and infinity in the numbers of a step."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals


def largest_magnitude(*tensors: tf.Tensor) -> tf.Tensor:
    """The largest |value| of all tensors; NaN if any of them is NaN.

    By bit patterns, because what the maximum of a NaN is depends on the device.

    Args:
        *tensors: float32 or float64 tensors of any shapes and one dtype.

    Returns:
        Scalar tensor of their dtype.

    Example:

    >>> largest_magnitude(tf.constant([-3.0, 2.0])).numpy()
    np.float32(3.0)
    """
    dtype = tensors[0].dtype
    integer = tf.int64 if dtype == tf.float64 else tf.int32
    largest = [
        tf.reduce_max(tf.bitcast(values, integer) & integer.max)
        for values in tensors
    ]
    return tf.bitcast(tf.reduce_max(largest), dtype)


def is_sum_finite(magnitudes: tf.Tensor) -> tf.Tensor:
    """Returns True if no sum over the replicas can be NaN or infinite.

    Args:
        magnitudes: Float tensor `[N]`, each replica's `largest_magnitude`.

    Returns:
        Scalar bool tensor.
    """
    return tf.math.is_finite(tf.reduce_sum(magnitudes))


def are_finite(tensors: Iterable[tf.Tensor | tf.IndexedSlices]) -> tf.Tensor:
    """Returns True if all tensors (or `tf.IndexedSlices`) are finite."""
    values = [getattr(tensor, "values", tensor) for tensor in tensors]
    return tf.reduce_all(
        [tf.reduce_all(tf.math.is_finite(v)) for v in values]
        + [tf.constant(True)]
    )


def call_if_not_finite(
    variables: Sequence[tuple[str, tf.Variable | keras.Variable]],
    call: Callable[[str], None],
) -> None:
    """Calls a Python function when some variable holds NaN or infinity.

    In a program that XLA compiles as a whole nothing is called, because such a
    program cannot call Python.

    Args:
        variables: Pairs of what to say, and of the variable of floats.
        call: Function of the message of the first one that is not finite.
    """
    if not variables or keras_internals.in_xla_context():
        return
    messages = [message for message, _ in variables]

    def look(flags: np.ndarray) -> None:
        for message, is_finite in zip(messages, flags, strict=True):
            if not is_finite:
                call(message)
                break

    flags = tf.stack(
        [are_finite([tf.convert_to_tensor(v)]) for _, v in variables]
    )
    with tf.device("CPU:0"):
        tf.numpy_function(look, [flags], [])
