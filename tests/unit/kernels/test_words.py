"""Words as floats of the same bits, and back."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import words

# Among them a NaN with a payload, and a number that is denormal as a float.
BITS = [0, 1, 0x7FA00001, 0x80000000, 0xFFFFFFFF]


@pytest.mark.parametrize("dtype", [tf.int32, tf.uint32])
def test_words_are_held_as_floats(dtype):
    array = np.array(BITS, np.uint32).view(dtype.as_numpy_dtype)
    held = words.hold(tf.constant(array))
    assert held.dtype == tf.float32
    np.testing.assert_array_equal(words.release(held, dtype), array)
    held_array = words.hold_array(array, dtype)
    assert held_array.dtype == np.float32
    released = words.release_array(held_array, dtype)
    assert released.dtype == array.dtype
    np.testing.assert_array_equal(released, array)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.int64])
def test_all_else_is_held_as_it_is(dtype):
    tensor = tf.constant([1, 2], dtype)
    assert words.hold(tensor) is tensor
    assert words.release(tensor, dtype) is tensor
    array = tensor.numpy()
    assert words.hold_array(array, dtype) is array
    assert words.release_array(array, dtype) is array


def test_an_array_of_another_dtype():
    with pytest.raises(ValueError, match=r"dtype int32. Received: int64"):
        words.hold_array([1, 2], tf.int32)
