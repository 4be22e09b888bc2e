"""Numbers of a few bits in words."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import tensorflow as tf

from tf_regtopk.codecs import bit_packing
from tf_regtopk.sizes import packing


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 32), st.integers(1, 200), st.integers(0, 2**32))
def test_packed_numbers_come_back(width, size, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2**width, size, dtype=np.uint64).astype("u4")
    words = bit_packing.pack(tf.constant(numbers), width)
    assert words.shape == [packing.num_words(size, width)]
    # Without gaps, but for less than a word for each power of two in the width.
    assert 32 * words.shape[0] < size * width + 32 * max(1, width.bit_count())
    np.testing.assert_array_equal(
        bit_packing.unpack(words, size, width), numbers
    )
