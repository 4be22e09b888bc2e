"""A mark of a replica's step and weights, by which replicas notice a drift.

Replicas apply the same sums, and so have the same weights. Where they have not,
because weights were set on one worker only or because processors round
differently, nothing else would show, and every replica trains a model of its
own.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_regtopk.kernels import ranges

# A step looks at so many variables, and at so many entries of each.
_MOST_VARIABLES, _MOST_ENTRIES = 4, 1 << 14


def sample(variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Returns a few variables, from the first to the last one of a list."""
    last = len(variables) - 1
    places = {
        round(i * last / (_MOST_VARIABLES - 1)) for i in range(_MOST_VARIABLES)
    }
    return [variables[i] for i in sorted(places)] if variables else []


def mark(weights: Sequence[tf.Tensor], step: tf.Tensor) -> tf.Tensor:
    r"""Computes a word that replicas have in common at the same step.

        mark = step
        mark = 31 mark + sum over j of (2 j + 1) bits(w_j)     for each tensor w

    Of large tensors each step takes another run of entries, so that after a
    while all entries have been looked at.

    Args:
        weights: Float tensors, those of the variables of `sample`.
        step: Scalar integer, the number of steps taken so far.

    Returns:
        Scalar int32 tensor.

    Example:

    >>> weights = tf.constant([1.0, 2.0])
    >>> first = mark([weights], tf.constant(3))
    >>> bool(first == mark([weights], tf.constant(3)))
    True
    >>> bool(first == mark([weights + 1e-6], tf.constant(3)))
    False
    """
    step = tf.cast(step, tf.int32)
    word = step
    for tensor in weights:
        size = tensor.shape.num_elements()
        length = min(size, _MOST_ENTRIES)
        if not length:
            continue
        # The last run begins earlier, in order to be as long as the others.
        start = tf.minimum(step % -(-size // length) * length, size - length)
        run = tf.slice(tf.reshape(tensor, [size]), [start], [length])
        bits = tf.reshape(_bits(run), [length, -1])
        factors = 2 * ranges.range_from(start, length) + 1
        word = 31 * word + tf.reduce_sum(factors[:, tf.newaxis] * bits)
    return word


def _bits(values: tf.Tensor) -> tf.Tensor:
    """The bits of floats as int32, `[n]` or for float64 `[n, 2]`."""
    if values.dtype.size < 4:
        values = tf.cast(values, tf.float32)
    return tf.bitcast(values, tf.int32)
