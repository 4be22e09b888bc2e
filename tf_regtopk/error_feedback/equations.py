"""The equations that rules of error feedback share."""

import tensorflow as tf


def accumulate(e: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """The accumulated gradient `a = e + g`.

    Args:
        e: Float tensor `[J]`, this replica's residual error.
        g: Float tensor `[J]`, this replica's gradient.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> accumulate(tf.constant([1.0, 0.0]), tf.constant([0.5, 2.0])).numpy()
    array([1.5, 2. ], dtype=float32)
    """
    return e + g


def residual_error(
    a: tf.Tensor, indices: tf.Tensor, sent: tf.Tensor
) -> tf.Tensor:
    """The residual error `e = a - sent`; exactly 0 where a was sent as it is.

    Args:
        a: Float tensor `[J]`, the accumulated gradient.
        indices: int32 tensor `[k]`, the positions sent, each once.
        sent: Float tensor `[k]`, the values that the receivers see.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> a = tf.constant([1.5, 2.0, 3.0])
    >>> residual_error(a, tf.constant([2]), tf.constant([3.0])).numpy()
    array([1.5, 2. , 0. ], dtype=float32)
    """
    if indices.shape == a.shape:  # All were sent, in their order.
        return a - sent
    left = tf.gather(a, indices) - sent
    return tf.tensor_scatter_nd_update(a, indices[:, tf.newaxis], left)


def add_sent(h: tf.Tensor, indices: tf.Tensor, sent: tf.Tensor) -> tf.Tensor:
    """`h + sent`, with arguments as of `residual_error`."""
    if indices.shape == h.shape:
        return h + sent
    return tf.tensor_scatter_nd_add(h, indices[:, tf.newaxis], sent)


def clear_sent(u: tf.Tensor, indices: tf.Tensor, sent: tf.Tensor) -> tf.Tensor:
    """`u`, but 0 where something was sent, with arguments as of `add_sent`."""
    if indices.shape == u.shape:
        return tf.where(sent == 0, u, tf.zeros_like(u))
    left = tf.where(sent == 0, tf.gather(u, indices), tf.zeros_like(sent))
    return tf.tensor_scatter_nd_update(u, indices[:, tf.newaxis], left)


def clip(gradient: tf.Tensor, norm: float) -> tf.Tensor:
    """`gradient`, scaled down to at most this Euclidean norm."""
    # The squares of what is not scaled may be too large for a float.
    largest = tf.reduce_max(tf.abs(gradient))
    scaled = tf.math.divide_no_nan(gradient, largest)
    ratio = tf.math.divide_no_nan(norm / tf.norm(scaled), largest)
    return tf.where(ratio < 1, gradient * ratio, gradient)
