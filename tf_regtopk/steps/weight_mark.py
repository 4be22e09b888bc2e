"""A mark of a replica's step and weights, by which replicas notice a drift.

Replicas apply the same sums, and so have the same weights. Where they have not,
because weights were set on one worker only or because processors round
differently, nothing else would show, and every replica trains a model of its
own.
"""

from collections.abc import Sequence
import math

import keras
import tensorflow as tf

from tf_regtopk.kernels import ranges

# Only small variables are looked at, because the update of a variable that is
# being read makes a copy of the variable (tests/integration/test_memory.py).
_MOST_VARIABLES, _MOST_ENTRIES = 4, 1 << 14


def sample(variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Returns a few small variables, from the first to the last of a list."""
    small = [
        variable
        for variable in variables
        if 0 < math.prod(variable.shape) <= _MOST_ENTRIES
        and tf.as_dtype(variable.dtype).is_floating
    ]
    last = len(small) - 1
    places = {
        round(i * last / (_MOST_VARIABLES - 1)) for i in range(_MOST_VARIABLES)
    }
    return [small[i] for i in sorted(places)] if small else []


def mark(weights: Sequence[tf.Tensor], step: tf.Tensor) -> tf.Tensor:
    r"""Computes a word that replicas have in common at the same step.

        mark = step
        mark = 31 mark + sum over j of (2 j + 1) bits(w_j)     for each tensor w

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
    word = step = tf.cast(step, tf.int32)
    for tensor in weights:
        size = tensor.shape.num_elements()
        bits = tf.reshape(_bits(tensor), [size, -1])
        # The range starts at 0, but depends on the step, see `range_from`.
        factors = 2 * ranges.range_from(step - step, size) + 1
        word = 31 * word + tf.reduce_sum(factors[:, tf.newaxis] * bits)
    return word


def _bits(values: tf.Tensor) -> tf.Tensor:
    """The bits of floats as int32, of which float64 have two each."""
    if values.dtype.size < 4:
        values = tf.cast(values, tf.float32)
    return tf.bitcast(values, tf.int32)
