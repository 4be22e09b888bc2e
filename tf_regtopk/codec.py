"""The payload of one replica: k indices and k values in one int32 tensor.

One tensor, because each gathered tensor costs a collective of its own, and
int32, because `tf.distribute` gathers no type that holds both.
"""

import tensorflow as tf


def encode(indices, values):
    """Packs entries into one payload.

    Args:
        indices: int32 tensor `[k]`.
        values: float32 or float64 tensor `[k]`.

    Returns:
        `(payload, sent)`: an int32 tensor, `[2 k]` for float32 values and
        `[3 k]` for float64; and the values as the receivers decode them, here
        `values` to the bit.

    Example:

    >>> payload, sent = encode(tf.constant([7]), tf.constant([0.5]))
    >>> decode(payload[tf.newaxis], 1, tf.float32)[0].numpy().tolist()
    [[7]]
    """
    # A float64 is bitcast to two int32, on an axis of their own.
    bits = tf.reshape(tf.bitcast(values, tf.int32), [-1])
    return tf.concat([indices, bits], axis=0), values


def decode(payloads, k, dtype):
    """Unpacks the payloads of N replicas.

    Args:
        payloads: int32 tensor `[N, length]`, as made by `encode`.
        k: Number of entries in each payload.
        dtype: float32 or float64, the dtype of the values.

    Returns:
        `(indices, values)`, both of shape `[N, k]`.
    """
    indices, bits = payloads[:, :k], payloads[:, k:]
    if dtype.size > 4:
        bits = tf.reshape(bits, [-1, k, dtype.size // 4])
    return indices, tf.bitcast(bits, dtype)
