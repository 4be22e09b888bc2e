"""Index codecs: round trips, and lengths against the entropy."""

import math

import compiled_codecs
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.codecs import index_codecs


def index_sets(size, k):
    """Random, clustered and extreme sets of k of `size` indices."""

    def clustered(first):
        return np.arange(first, first + k)

    def random(seed):
        rng = np.random.default_rng(seed)
        return np.sort(rng.choice(size, k, replace=False))

    def with_gap(at):
        return np.concatenate([np.arange(at), np.arange(size - (k - at), size)])

    def every(seed):
        stride = size // k
        return np.arange(k) * stride + seed % (size - (k - 1) * stride)

    seeds = st.integers(0, 2**32)
    return st.one_of(
        seeds.map(random),
        st.integers(0, size - k).map(clustered),
        st.integers(0, k).map(with_gap),
        seeds.map(every),
    )


SIZES = [(1, 1), (2, 1), (37, 5), (64, 64), (1000, 10), (1000, 999), (5003, 61)]


@pytest.mark.parametrize("name", ["auto", *index_codecs.CODECS])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_index_round_trip(name, data):
    size, k = data.draw(st.sampled_from(SIZES))
    codec = index_codecs.choose(name, k, size)
    indices = data.draw(index_sets(size, k))
    words = codec.encode(tf.constant(indices, tf.int32))
    assert words.dtype == tf.uint32
    assert words.shape == [codec.num_words]
    num_used = int(codec.num_used(words))
    assert not words[num_used:].numpy().any()
    if not codec.is_variable:
        assert num_used == codec.num_words
    decoded, is_valid = codec.decode(words)
    np.testing.assert_array_equal(decoded, indices)
    assert is_valid


@pytest.mark.parametrize("name", index_codecs.CODECS)
@pytest.mark.parametrize("size, k", [(5003, 61), (1 << 18, 2621)])
def test_index_round_trip_compiled(name, size, k):
    codec = index_codecs.choose(name, k, size)

    @compiled_codecs.compiled
    def round_trip(indices):
        words = codec.encode(indices)
        return words, *codec.decode(words)

    @settings(max_examples=12, deadline=None)
    @given(index_sets(size, k))
    def check(indices):
        words, decoded, is_valid = round_trip(tf.constant(indices, tf.int32))
        np.testing.assert_array_equal(
            words, codec.encode(tf.constant(indices, tf.int32))
        )
        np.testing.assert_array_equal(decoded, indices)
        assert is_valid

    check()


@pytest.mark.parametrize("name", ["int32", "elias_fano", "golomb"])
def test_largest_gradient(name):
    size = 2**31 - 1
    indices = [0, 1, size // 2, size - 1]
    codec = index_codecs.choose(name, len(indices), size)
    decoded, is_valid = codec.decode(codec.encode(tf.constant(indices)))
    assert decoded.numpy().tolist() == indices
    assert is_valid


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
def test_length_against_the_bound(density):
    size = 1_000_000
    k = round(density * size)
    rng = np.random.default_rng(0)
    indices = tf.constant(np.sort(rng.choice(size, k, replace=False)), tf.int32)
    bound = index_codecs.entropy_bits(k, size)

    def length(name):
        codec = index_codecs.choose(name, k, size)
        words = codec.encode(indices)
        return 32 * int(codec.num_used(words))

    assert bound < length("golomb") < 1.03 * bound
    assert length("golomb") < length("elias_fano") < 1.13 * bound
    assert length("int32") == 32 * k
    assert length("bitmap") == size


@pytest.mark.parametrize("k, size", [(1, 1), (3, 10), (10, 1000), (40, 41)])
def test_entropy(k, size):
    expected = math.log2(math.comb(size, k))
    assert index_codecs.entropy_bits(k, size) == pytest.approx(expected)


@pytest.mark.parametrize(
    "k, expected",
    [
        (1, index_codecs.Int32),
        (10_000, index_codecs.EliasFano),
        (400_000, index_codecs.Bitmap),
        (1_000_000, index_codecs.Every),
    ],
)
def test_auto_takes_the_shortest(k, expected):
    chosen = index_codecs.choose("auto", k, 1_000_000)
    assert type(chosen) is expected
    for name in ("int32", "elias_fano", "bitmap"):
        other = index_codecs.choose(name, k, 1_000_000)
        assert chosen.num_words <= other.num_words


def test_too_many_bits_for_an_int32():
    with pytest.raises(ValueError, match="`indices` must be"):
        index_codecs.choose("elias_fano", 2**30 + 1, 2**31 - 1)
