r"""Words: 32 bits of a payload or an index, and how TensorFlow holds them.

Inside a compiled function words are int32 or uint32, and numbers. Outside they
are *held*: as float32 of the same bits, with which nothing is done but copies.
TensorFlow keeps int32 tensors and variables in the memory of the host, whatever
device they belong to: a compiled function on a GPU refuses such a variable, and
payloads would cross the bus several times a step. Of the dtypes that its
collectives take, float32 is the one of 32 bits that stays on the device.

    compiled function          outside                      file
    int32, uint32     hold ->  float32  (variables,
                  <- release            collectives)   ->   int32, uint32
"""

import numpy as np
import tensorflow as tf

HELD = tf.float32
_WORDS = (tf.int32, tf.uint32)


def hold(value):
    """The form of a tensor outside of compiled functions.

    Args:
        value: Tensor of any dtype.

    Returns:
        Float32 tensor of the same bits for words, else `value`.

    Example:

    >>> held = hold(tf.constant([3, -1]))
    >>> held.dtype.name, release(held, tf.int32).numpy().tolist()
    ('float32', [3, -1])
    """
    return tf.bitcast(value, HELD) if value.dtype in _WORDS else value


def release(held, dtype):
    """The inverse of `hold`.

    Args:
        held: Tensor from `hold`.
        dtype: Dtype that the tensor had before.

    Returns:
        Tensor of that dtype.
    """
    return tf.bitcast(held, dtype) if dtype in _WORDS else held


def hold_array(array, dtype):
    """As `hold`, for a NumPy array that is to be of this dtype.

    Raises:
        ValueError: If the array is of another dtype.
    """
    array = np.asarray(array)
    if tf.as_dtype(array.dtype) != dtype:
        raise ValueError(
            f"The saved array must be of dtype {dtype.name}. "
            f"Received: {array.dtype}"
        )
    return array.view(HELD.as_numpy_dtype) if dtype in _WORDS else array


def release_array(held, dtype):
    """As `release`, for a NumPy array."""
    return held.view(dtype.as_numpy_dtype) if dtype in _WORDS else held
