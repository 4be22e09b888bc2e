"""Bitmaps against NumPy, in the form for CPUs and in that for GPUs."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import device_kind


@pytest.fixture(params=["CPU", "GPU"], autouse=True)
def _kind(request):
    with device_kind.compile_for(request.param):
        yield


def random_bits(density, num_words, seed=0):
    """A bool array, and its words."""
    rng = np.random.default_rng(seed)
    bits = rng.random(num_words * bitmap.WORD) < density
    return bits, tf.constant(np.packbits(bits, bitorder="little").view("<u4"))


@pytest.mark.parametrize("num_words", [32, 32 * 5])
def test_pack(num_words):
    cases = [random_bits(0.3, num_words, seed) for seed in range(2)]
    (first, expected_first), (second, expected_second) = cases
    cut = num_words // 32 // 2 * bitmap.SQUARE
    packed = bitmap.pack(
        tf.constant(first.reshape(-1, 8)),
        [tf.constant(second[:cut]), tf.constant(second[cut:])],
    )
    for actual, expected in zip(
        packed, [expected_first, expected_second], strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("num_words", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("density", [0.003, 0.2, 0.9, 1.0])
def test_positions(density, num_words):
    """Few bits are searched by rows of words, and many by words."""
    bits, words = random_bits(density, num_words)
    expected = np.flatnonzero(bits)
    for num_set in {len(expected), len(expected) // 2} - {0}:
        actual = bitmap.positions(words, num_set)
        np.testing.assert_array_equal(actual, expected[:num_set])


def test_counts():
    bits, words = random_bits(0.4, 300)
    rows = bits.reshape(-1, bitmap.WORD)
    counts = rows.sum(axis=1)
    np.testing.assert_array_equal(bitmap.unpack(words), rows)
    np.testing.assert_array_equal(bitmap.count_bits(words), counts)
    np.testing.assert_array_equal(
        bitmap.bits_before(words), np.cumsum(counts) - counts
    )
    np.testing.assert_array_equal(
        bitmap.set_bits_before(words), np.cumsum(rows, axis=1) - rows
    )


def test_lowest():
    bits, words = random_bits(0.4, 100)
    rows = bits.reshape(-1, bitmap.WORD)
    num_kept = np.random.default_rng(1).integers(-2, 33, 100)
    expected = rows & (np.cumsum(rows, axis=1) <= num_kept[:, np.newaxis])
    actual = bitmap.lowest(words, tf.constant(num_kept, tf.int32))
    np.testing.assert_array_equal(bitmap.unpack(actual), expected)


def test_compact():
    bits, words = random_bits(0.4, 70)
    values = np.random.default_rng(1).integers(0, 1 << 30, bits.size)
    actual = bitmap.compact(words, tf.constant(values, tf.int32), bits.sum())
    np.testing.assert_array_equal(actual, values[bits])


def test_of_positions():
    bits, words = random_bits(0.4, 70)
    positions = tf.constant(np.flatnonzero(bits), tf.int32)
    np.testing.assert_array_equal(bitmap.of_positions(positions, 70), words)
    np.testing.assert_array_equal(
        bitmap.word_of(positions), np.flatnonzero(bits) // bitmap.WORD
    )
    actual = bitmap.of_positions(
        tf.range(bits.size), 70, tf.constant(bits, tf.uint32)
    )
    np.testing.assert_array_equal(actual, words)


def test_histogram_ignores_larger_values():
    actual = bitmap.histogram(tf.constant([[4, 0], [2, 2]]), 4)
    np.testing.assert_array_equal(actual, [1, 0, 2, 0])


def test_run_of_each():
    actual = bitmap.run_of_each(tf.constant([3, 3, 150]), 200)
    expected = np.repeat([0, 2, 3], [3, 147, 50])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("size", [1, 16, 64, 65, 1000, 8193, 20_001])
@pytest.mark.parametrize("largest", [1, 256, 1 << 22, None])
def test_cumulative_sum(size, largest):
    rng = np.random.default_rng(size)
    # A sum may be more than a float32 counts, and fits in an int32.
    most = min(largest or 1 << 30, (1 << 31) // size - 1)
    values = rng.integers(0, most, size, endpoint=True)
    actual = bitmap.cumulative_sum(tf.constant(values, tf.int32), largest)
    np.testing.assert_array_equal(actual, np.cumsum(values))
