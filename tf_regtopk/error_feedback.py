"""Error feedback: what was not sent is remembered and sent later.

    a_n^t     = e_n^t + g_n^t          (accumulate)
    e_n^{t+1} = a_n^t - sent_n^t       (residual_error)

Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018).
"""

import tensorflow as tf


def accumulate(error, gradient):
    """The accumulated gradient `a = e + g`.

    Args:
        error: Float tensor `[J]`, this replica's residual error e.
        gradient: Float tensor `[J]`, this replica's gradient g.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> accumulate(tf.constant([1.0, 0.0]), tf.constant([0.5, 2.0])).numpy()
    array([1.5, 2. ], dtype=float32)
    """
    return error + gradient


def residual_error(accumulated, indices, sent):
    """The residual error `e = a - sent`; exactly 0 where a was sent as it is.

    Args:
        accumulated: Float tensor `[J]`, the accumulated gradient a.
        indices: int32 tensor `[k]`, the positions sent, each once.
        sent: Float tensor `[k]`, the values that the receivers see.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> a = tf.constant([1.5, 2.0, 3.0])
    >>> residual_error(a, tf.constant([2]), tf.constant([3.0])).numpy()
    array([1.5, 2. , 0. ], dtype=float32)
    """
    left = tf.gather(accumulated, indices) - sent
    return tf.tensor_scatter_nd_update(
        accumulated, indices[:, tf.newaxis], left
    )
