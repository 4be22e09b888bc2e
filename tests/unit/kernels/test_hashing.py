"""Hashes against Python's integers."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import hashing

MASK = 2**32 - 1


def mix(x):
    """MurmurHash3's finaliser."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


@pytest.mark.parametrize(
    "seed, step, replica",
    [(0, 0, 0), (7, 3, 2), (-1, 2**31 - 1, 1), (2**40 + 5, 2**33, 3)],
)
def test_hashes(seed, step, replica):
    start = mix((step & MASK) ^ mix(replica))
    hashes = [
        mix(mix((j + start) & MASK) + mix(seed & MASK) & MASK)
        for j in range(1500)
    ]
    arguments = (1500, seed, tf.constant(step, tf.int64), tf.constant(replica))
    np.testing.assert_array_equal(hashing.hash_bits(*arguments), hashes)
    for dtype in (tf.float32, tf.float64):
        actual = hashing.uniform(*arguments, dtype=dtype)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(
            actual, np.array(hashes) // 2**8 / 2.0**24
        )
