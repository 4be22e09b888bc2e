"""The header of a payload: what all replicas have to know of it."""

import tensorflow as tf


def add_header(magnitude, step, payload):
    """Puts before a payload what all replicas have to know of this one.

    Args:
        magnitude: Float scalar, the largest magnitude this replica has met.
        step: Integer scalar, the number of steps this replica has taken.
        payload: int32 tensor `[length]`.

    Returns:
        int32 tensor, longer by `header_words`.
    """
    bits = tf.reshape(tf.bitcast(magnitude, tf.int32), [-1])
    step = tf.reshape(tf.cast(step, tf.int32), [1])
    return tf.concat([step, bits, payload], axis=0)


def header_words(dtype):
    """Number of words of a header with a magnitude of a float dtype."""
    return 1 + dtype.size // 4


def split_header(payloads, dtype):
    """The inverse of `add_header` for the payloads of N replicas.

    Args:
        payloads: int32 tensor `[N, length]`.
        dtype: Float dtype of the magnitudes.

    Returns:
        `(magnitudes, steps, payloads)`: a float tensor `[N]`, an int32 tensor
        `[N]`, and an int32 tensor.
    """
    bits = payloads[:, 1 : header_words(dtype)]
    if dtype.size == 4:
        bits = bits[:, 0]
    return (
        tf.bitcast(bits, dtype),
        payloads[:, 0],
        payloads[:, header_words(dtype) :],
    )
