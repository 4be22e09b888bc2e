r"""Words: 32 bits of a payload or an index, and how TensorFlow holds them.

Inside a compiled function words are numbers, int32 or uint32. Outside words are
*held* as float32 of the same bits, with which nothing is done but copies. The
reason is that TensorFlow keeps int32 tensors and variables in the memory of the
host, whatever device they belong to: a compiled function on a GPU refuses such
a variable, and payloads would cross the bus several times per step. Among the
dtypes that TensorFlow's collectives take, only float32 has 32 bits and stays on
the device.

    compiled function          outside                      file
    int32, uint32     hold ->  float32  (variables,
                  <- release            collectives)   ->   int32, uint32
"""

import numpy as np
import numpy.typing as npt
import tensorflow as tf

HELD = tf.float32
_WORDS = (tf.int32, tf.uint32)


def hold(value: tf.Tensor) -> tf.Tensor:
    """Returns the form of a tensor outside of compiled functions.

    Args:
        value: Tensor of any dtype.

    Returns:
        Float32 tensor of the same bits if `value` holds words, `value` itself
        if it does not.

    Example:

    >>> held = hold(tf.constant([3, -1]))
    >>> held.dtype.name, release(held, tf.int32).numpy().tolist()
    ('float32', [3, -1])
    """
    return tf.bitcast(value, HELD) if value.dtype in _WORDS else value


def release(held: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Inverts `hold`.

    Args:
        held: Tensor from `hold`.
        dtype: Dtype that the tensor had before.

    Returns:
        Tensor of that dtype.
    """
    return tf.bitcast(held, dtype) if dtype in _WORDS else held


def hold_array(array: npt.ArrayLike, dtype: tf.DType) -> np.ndarray:
    """Applies `hold` to a NumPy array.

    Args:
        array: Array, or a value that NumPy converts to an array.
        dtype: Dtype that the array must have.

    Returns:
        Float32 array of the same bits if the array holds words, the array
        itself if it does not.

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


def release_array(held: np.ndarray, dtype: tf.DType) -> np.ndarray:
    """Applies `release` to a NumPy array."""
    return held.view(dtype.as_numpy_dtype) if dtype in _WORDS else held
