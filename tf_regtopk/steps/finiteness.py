"""Tests for NaN and infinity in the numbers of a step."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk import selection
from tf_regtopk import sparsifiers


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


def magnitude_of_sent(
    sparsifier: sparsifiers.Sparsifier,
    a: tf.Tensor,
    indices: tf.Tensor,
    values: tf.Tensor,
) -> tf.Tensor:
    """The magnitude by which others learn whether what is sent is finite.

    Args:
        sparsifier: `Sparsifier` that has selected the entries.
        a: Float tensor `[J]`, the accumulated gradient.
        indices: int32 tensor `[k]`, the entries that were selected.
        values: Float tensor `[k]`, as the receivers decode them.

    Returns:
        Scalar tensor, as of `largest_magnitude`.

    Example:

    >>> a, indices = tf.constant([-3.0, np.inf]), tf.constant([0])
    >>> magnitude_of_sent(
    ...     sparsifiers.TopK(), a[:1], indices, tf.constant([-2.0])).numpy()
    np.float32(3.0)
    >>> magnitude_of_sent(
    ...     sparsifiers.RandomK(), a, indices, tf.constant([-2.0])).numpy()
    np.float32(inf)
    """
    return largest_magnitude(
        # Not all entries have to be looked at if entries that are not finite
        # are always selected.
        *([] if sparsifier.selects_non_finite else [a]),
        # What was selected is looked at as well, because a codec may make
        # infinity a finite value, or leave an entry out.
        selection.take(a, indices),
        values,
    )


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
