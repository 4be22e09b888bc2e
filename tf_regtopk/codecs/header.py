"""The header of a payload: a replica's mark and its largest magnitude."""

import tensorflow as tf


def add_header(
    magnitude: tf.Tensor, mark: tf.Tensor, payload: tf.Tensor
) -> tf.Tensor:
    """Puts the facts that all replicas need about this one before a payload.

    Args:
        magnitude: Float scalar, the largest magnitude this replica has met.
        mark: int32 scalar, by which replicas at the same step know each other.
        payload: int32 tensor `[length]`.

    Returns:
        int32 tensor, longer by `header_words`.
    """
    bits = tf.reshape(tf.bitcast(magnitude, tf.int32), [-1])
    return tf.concat([tf.reshape(mark, [1]), bits, payload], axis=0)


def header_words(dtype: tf.DType) -> int:
    """Number of words of a header with a magnitude of a float dtype."""
    return 1 + dtype.size // 4


def split_header(
    payloads: tf.Tensor, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Inverts `add_header` for the payloads of N replicas.

    Args:
        payloads: int32 tensor `[N, length]`.
        dtype: Float dtype of the magnitudes.

    Returns:
        `(magnitudes, marks, payloads)`: a float tensor `[N]`, an int32 tensor
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
