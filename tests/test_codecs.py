"""Index and value codecs: round trips, bounds, rounding, hostile payloads."""

import dataclasses
import functools
import math

import flat_gradients
import fuzz_payloads
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.codecs import bit_packing
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs
from tf_regtopk.kernels import device_kind

STREAM = (0, 0)  # A step and a replica.


def compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)


# --- bits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 32), st.integers(1, 200), st.integers(0, 2**32))
def test_packed_numbers_come_back(width, size, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2**width, size, dtype=np.uint64).astype("u4")
    words = bit_packing.pack(tf.constant(numbers), width)
    assert words.shape == [bit_packing.num_words(size, width)]
    # Without gaps, but for less than a word for each power of two in the width.
    assert 32 * words.shape[0] < size * width + 32 * max(1, width.bit_count())
    np.testing.assert_array_equal(
        bit_packing.unpack(words, size, width), numbers
    )


# --- indices


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

    @compiled
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


# --- values


VALUES = {
    **value_codecs.CODECS,
    "natural, seed": tf_regtopk.Natural(seed=7),
    "uniform, 1 bit": tf_regtopk.Uniform(num_bits=1, bucket_size=5),
    "uniform, 8 bits": tf_regtopk.Uniform(num_bits=8, bucket_size=1000),
    "uniform, all": tf_regtopk.Uniform(bucket_size=10**9),
    "sign, 1": tf_regtopk.ScaledSign(bucket_size=1),
}
ROUNDS_TO_NEIGHBOUR = ["bfloat16", "float16", "natural", "float32"]


@functools.cache
def compiled_codec(codec, k, dtype):
    """`encode` and `decode` of a codec, compiled once for all tests."""
    return (
        compiled(codec.encode),
        compiled(lambda words: codec.decode(words, k, dtype)),
    )


def code(codec, values, stream=STREAM, dtype=tf.float32):
    """The values as decoded, by compiled and by eager code alike."""
    values = tf.constant(values, dtype)
    k = values.shape[0]
    encode, decode = compiled_codec(codec, k, dtype)
    words = encode(values, tuple(map(tf.constant, stream)))
    assert words.dtype == tf.uint32
    assert words.shape == [codec.num_words(k, dtype)]
    decoded = decode(words)
    assert decoded.dtype == dtype
    assert decoded.numpy().tobytes() == (
        codec.decode(words, k, dtype).numpy().tobytes()
    )
    return decoded.numpy()


EXTREMES = {
    "zeros": [0.0, -0.0, 0.0],
    "one": [2.5],
    "constant": [-3.25] * 9,
    "large": [3e38, -3.4e38, 1.0, 3.4028235e38],
    "largest": [3.4028235e38, -3.4028235e38],
    "small": [1e-38, -2e-38, 1e-45, -1e-40, 3e-38],
    "wide": [1e-30, 1e30, -1e-10, 1.0, -1.0, 0.0, 7.0],
    "spike": [0.0] * 50 + [1e20],
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_values_stay_finite_and_bounded(name, case):
    # Of one length, to compile once: again and again the same.
    size = 1 if case == "one" else 51
    values = np.resize(np.array(EXTREMES[case], np.float32), size)
    decoded = code(VALUES[name], values)
    assert np.isfinite(decoded).all()
    largest = np.abs(values).max()
    bound = np.float64(largest) * (2 if "natural" in name else 1)
    if "uniform" in name:  # The step is rounded up.
        bound *= 1 + 2.0**-14
    if "bfloat16" in name:
        bound *= 1 + 2.0**-8
    assert np.abs(decoded).max() <= bound * (1 + 1e-6)
    if case == "constant" and "natural" in name:
        assert set(decoded.tolist()) <= {-2.0, -4.0}
    elif case == "constant":
        np.testing.assert_allclose(decoded, -3.25, rtol=1e-6)


@pytest.mark.parametrize("name", ROUNDS_TO_NEIGHBOUR)
def test_decoded_and_error_are_the_value_to_the_bit(name):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) * np.exp(3 * rng.standard_normal(1000))
    values = values.astype(np.float32)
    decoded = code(VALUES[name], values)
    assert (decoded + (values - decoded) == values).all()
    assert (np.sign(decoded) == np.sign(values)).all()
    if name == "float32":
        assert decoded.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_float64_values(name):
    values = np.random.default_rng(0).standard_normal(333)
    decoded = code(VALUES[name], values, dtype=tf.float64)
    if name == "float32":
        assert decoded.tobytes() == values.tobytes()
    else:
        expected = code(VALUES[name], values.astype(np.float32))
        np.testing.assert_array_equal(decoded, expected.astype(np.float64))


@pytest.mark.parametrize("name", ["bfloat16", "natural", "uniform", "sign"])
def test_float64_too_large_is_sent_as_far_as_possible(name):
    decoded = code(VALUES[name], [1e300, -1e300], dtype=tf.float64)
    np.testing.assert_allclose(decoded, [3.4e38, -3.4e38], rtol=0.51)


def test_natural_compression_is_unbiased():
    """For one value at a time, and its variance as in the paper."""
    for value in (1.0, 1.37, -1.5, 1.9999, 3e-20):
        decoded = code(VALUES["natural"], np.full(10**6, value, np.float32))
        value = np.float64(np.float32(value))
        low = 2.0 ** np.floor(np.log2(abs(value)))
        assert set(np.abs(decoded).tolist()) <= {low, 2 * low}
        standard_error = decoded.std(dtype=np.float64) / 1e3
        mean_error = abs(decoded.mean(dtype=np.float64) - value)
        assert mean_error <= 4 * standard_error + 1e-9 * low
        second_moment = np.mean(decoded.astype(np.float64) ** 2) / value**2
        assert second_moment <= 9 / 8 + 1e-3


def test_natural_compression_of_gaussians():
    values = np.random.default_rng(0).standard_normal(10**6).astype(np.float32)
    decoded = code(VALUES["natural"], values).astype(np.float64)
    values = values.astype(np.float64)
    error = decoded - values
    assert abs(error.mean()) <= 4 * error.std() / 1e3
    assert np.mean(decoded**2) / np.mean(values**2) <= 9 / 8
    # What the rounding adds on average for these values, as in the paper.
    low = 2.0 ** np.floor(np.log2(np.abs(values)))
    expected = 3 * low * np.abs(values) - 2 * low**2
    assert expected.mean() == pytest.approx(1.0816, abs=4e-3)
    difference = decoded**2 - expected
    assert abs(difference.mean()) <= 4 * difference.std() / 1e3


def test_uniform_buckets_of_gaussians():
    values = np.random.default_rng(0).standard_normal(1024 * 900)
    values = values.astype(np.float32)
    decoded = code(VALUES["uniform"], values).astype(np.float64)
    error = decoded - values
    assert np.mean(error**2) / np.mean(values**2) == pytest.approx(
        0.031, abs=2e-3
    )
    assert abs(error.mean()) <= 4 * error.std() / len(values) ** 0.5


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_uniform_levels(num_bits):
    """Every value goes to one of the two levels about it, right on average."""
    rng = np.random.default_rng(num_bits)
    bucket = rng.standard_normal(77).astype(np.float32) + 5
    values = np.tile(bucket, 2000)
    codec = tf_regtopk.Uniform(num_bits=num_bits, bucket_size=77)
    decoded = code(codec, values).reshape(2000, 77).astype(np.float64)
    low, high = bucket.min(), bucket.max()
    step = (np.float64(high) - low) / (2**num_bits - 1)
    level = (decoded - low) / step
    np.testing.assert_allclose(level, np.round(level), atol=2e-2)
    assert (np.abs(decoded - bucket) < step * (1 + 1e-3)).all()
    standard_error = decoded.std(axis=0) / 2000**0.5
    mean_error = np.abs(decoded.mean(axis=0) - bucket)
    assert (mean_error <= 5 * standard_error + 1e-3 * step).all()


@pytest.mark.parametrize("bucket_size", [None, 1, 7, 1024])
def test_scaled_sign(bucket_size):
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    decoded = code(tf_regtopk.ScaledSign(bucket_size), values)
    size = bucket_size or 100
    for first in range(0, 100, size):
        part = values[first : first + size]
        np.testing.assert_allclose(
            decoded[first : first + size],
            np.where(part < 0, -1, 1) * np.abs(part).mean(dtype=np.float64),
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", ["natural", "uniform"])
def test_stochastic_rounding_is_fresh_and_reproducible(name):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    other_seed = type(VALUES[name])(seed=1)
    draws = [
        code(codec, values, stream).tobytes()
        for codec, stream in [
            (VALUES[name], (0, 0)),
            (VALUES[name], (1, 0)),
            (VALUES[name], (0, 1)),
            (VALUES[name], (1, 1)),
            (other_seed, (0, 0)),
        ]
    ]
    assert len(set(draws)) == 5
    assert code(VALUES[name], values, (0, 0)).tobytes() == draws[0]


# --- payloads


def test_stc_takes_nine_bits_an_entry():
    size, k = 1_000_000, 10_000
    codec = tf_regtopk.Codec("golomb", "ternary").payload(k, size)
    rng = np.random.default_rng(0)
    payload, _ = codec.encode(
        tf.constant(np.sort(rng.choice(size, k, replace=False)), tf.int32),
        tf.constant(rng.standard_normal(k), tf.float32),
        STREAM,
    )
    assert 32 * int(codec.num_used(payload)) / k == pytest.approx(9.1, abs=0.1)


@pytest.mark.parametrize("indices", ["auto", *index_codecs.CODECS])
@pytest.mark.parametrize("values", ["float32", "natural", "uniform", "ternary"])
def test_payloads_of_several_replicas(indices, values):
    size, k, num_replicas = 501, 17, 3
    rng = np.random.default_rng(0)
    codec = tf_regtopk.Codec(indices, values).payload(k, size)
    payloads, expected_indices, expected_values = [], [], []
    for replica in range(num_replicas):
        expected_indices.append(np.sort(rng.choice(size, k, replace=False)))
        payload, sent = codec.encode(
            tf.constant(expected_indices[-1], tf.int32),
            tf.constant(rng.standard_normal(k), tf.float32),
            (5, replica),
        )
        assert payload.dtype == tf.int32
        assert payload.shape == [codec.num_words]
        payloads.append(payload)
        expected_values.append(sent)
    decoded, sent, is_valid = compiled(codec.decode)(tf.stack(payloads))
    np.testing.assert_array_equal(decoded, expected_indices)
    np.testing.assert_array_equal(sent, expected_values)
    assert is_valid.numpy().tolist() == [True] * num_replicas


FUZZED = [
    (name, size, k)
    for name in index_codecs.CODECS
    for size, k in [(500, 7), (70, 35)]
]


@pytest.mark.parametrize("name, size, k", FUZZED)
def test_hostile_payloads(name, size, k):
    """Whatever arrives, indices stay in the gradient, and wrong ones are seen.

    `tests/fuzz_payloads.py` does the same with a million.
    """
    codec = tf_regtopk.Codec(name, "natural").payload(k, size)
    decode = compiled(codec.decode)
    valid, _ = codec.encode(
        tf.constant(np.arange(k) * (size // k), tf.int32),
        tf.ones([k]),
        STREAM,
    )

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, codec.num_words - 1), st.integers(0, 31)),
            max_size=4,
        ),
        st.integers(0, 2**32),
        st.booleans(),
    )
    def check(flips, seed, is_random):
        words = valid.numpy().view(np.uint32)
        if is_random:
            rng = np.random.default_rng(seed)
            words = rng.integers(0, 2**32, codec.num_words, dtype=np.uint64)
            words = words.astype(np.uint32)
        for word, bit in flips:
            words[word] ^= np.uint32(1 << bit)
        fuzz_payloads.check(codec, decode, words[np.newaxis].view(np.int32))

    check()


@pytest.mark.parametrize("name", ["elias_fano", "golomb", "bitmap", "int32"])
def test_wrong_payloads_are_recognised(name):
    size, k = 1000, 10
    codec = tf_regtopk.Codec(name, "float32").payload(k, size)
    indices = np.arange(k) * 97 + 3

    def is_valid(change):
        payload = codec.encode(
            tf.constant(indices, tf.int32), tf.ones([k]), STREAM
        )[0].numpy()
        change(payload)
        return codec.decode(tf.constant(payload[np.newaxis]))[2].numpy()[0]

    def change_nothing(payload):
        pass

    def cut(payload):
        payload[-2:] = 0

    def fill(payload):
        payload[-2:] = -1

    assert is_valid(change_nothing)
    assert not is_valid(fill)
    if name != "bitmap":  # Its last words may be empty.
        assert not is_valid(cut)
    if name == "int32":

        def repeat(payload):
            payload[k + 1] = payload[k]

        def swap(payload):
            payload[k], payload[k + 1] = payload[k + 1], payload[k]

        def leave(payload):
            payload[-1] = size

        def leave_below(payload):
            payload[k] = -1

        for change in (repeat, swap, leave, leave_below):
            assert not is_valid(change)


@pytest.mark.parametrize("name", ["elias_fano", "golomb", "bitmap", "int32"])
@pytest.mark.parametrize("values", ["float32", "natural", "uniform", "ternary"])
def test_payloads_decoded_at_once(name, values):
    """As GPUs do, with the same result."""
    size, k, num_replicas = 1000, 10, 3
    codec = tf_regtopk.Codec(name, values).payload(k, size)
    rng = np.random.default_rng(0)
    payloads = np.stack(
        [
            codec.encode(
                tf.constant(np.sort(rng.permutation(size)[:k]), tf.int32),
                tf.constant(rng.standard_normal(k), tf.float32),
                (0, n),
            )[0]
            for n in range(num_replicas)
        ]
    )

    def decode(kind):
        with device_kind.compile_for(kind):
            return codec.decode(tf.constant(payloads))

    for expected, actual in zip(decode("CPU"), decode("GPU"), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert all(decode("GPU")[2])
    # Every bit is set: too many of them, or indices of -1.
    payloads[1, codec.num_value_words :] = -1
    for kind in ("CPU", "GPU"):
        indices, _, is_valid = decode(kind)
        assert is_valid.numpy().tolist() == [True, False, True]
        assert np.min(indices) >= 0 and np.max(indices) < size


def test_payload_of_another_length():
    codec = tf_regtopk.Codec().payload(10, 1000)
    with pytest.raises(ValueError, match="`payloads` must hold 14 words each"):
        codec.decode(tf.zeros([2, 13], tf.int32))


# --- configuration


@pytest.mark.parametrize(
    "codec",
    [
        tf_regtopk.Codec(),
        tf_regtopk.Codec("golomb", "ternary"),
        tf_regtopk.Codec(values=tf_regtopk.Uniform(3, 64, seed=5)),
        tf_regtopk.Codec(values=tf_regtopk.ScaledSign(bucket_size=8)),
        tf_regtopk.Codec(values=tf_regtopk.BFloat16()),
    ],
)
def test_codec_is_saved(codec):
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(),
        codec=codec,
        error_feedback=tf_regtopk.NoFeedback(),
    )
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.codec == codec
    assert again.error_feedback == tf_regtopk.NoFeedback()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: tf_regtopk.Codec(indices="zip"),
            ValueError,
            '`indices` must be "auto" or "int32" or .* Received: indices=.zip',
        ),
        (
            lambda: tf_regtopk.Codec(values="int4"),
            ValueError,
            "`values` must be .*Received: values='int4'",
        ),
        (
            lambda: tf_regtopk.Codec(values=4),
            ValueError,
            "`values` must be .*Received: values=4",
        ),
        (
            lambda: tf_regtopk.Uniform(num_bits=9),
            ValueError,
            "`num_bits` must be from 1 to 8. Received: num_bits=9",
        ),
        (
            lambda: tf_regtopk.Uniform(num_bits=0),
            ValueError,
            "`num_bits` must be an integer >= 1. Received: num_bits=0",
        ),
        (
            lambda: tf_regtopk.Uniform(bucket_size=1.5),
            TypeError,
            "`bucket_size` must be an integer >= 1. Received: bucket_size=1.5",
        ),
        (
            lambda: tf_regtopk.ScaledSign(bucket_size=0),
            ValueError,
            "`bucket_size` must be an integer >= 1. Received: bucket_size=0",
        ),
        (
            lambda: tf_regtopk.Natural(seed=-1),
            ValueError,
            "`seed` must be an integer >= 0. Received: seed=-1",
        ),
        (
            lambda: tf_regtopk.Dense(density=0.5),
            ValueError,
            "`density` must be 1 for `Dense`. Received: density=0.5",
        ),
        (
            lambda: tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(), codec="float32"
            ),
            TypeError,
            "`codec` must be a `Codec` such as .* Received: codec='float32'",
        ),
        (
            lambda: tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(), error_feedback=True
            ),
            TypeError,
            "`error_feedback` must be an .* Received: error_feedback=True",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@keras.saving.register_keras_serializable(package="tests")
@dataclasses.dataclass(frozen=True)
class Complement(tf_regtopk.IndexCodec):
    """Indices whose bits are all turned."""

    @property
    def num_words(self):
        return self.k

    def encode(self, indices):
        return ~tf.bitcast(indices, tf.uint32)

    def decode(self, words):
        return tf.bitcast(~words, tf.int32), tf.constant(True)


def test_an_index_codec_of_the_user(mirrored):
    weights = []
    for indices in ("int32", Complement):
        codec = tf_regtopk.Codec(indices)
        assert tf_regtopk.Codec.from_config(codec.get_config()) == codec
        strategy = mirrored(2)
        with strategy.scope():
            variable = keras.Variable(np.zeros(30), dtype="float32")
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1), tf_regtopk.TopK(0.2), codec=codec
            )
        step = flat_gradients.step_function(strategy, optimizer, [variable])
        for seed in range(2):
            g = np.random.default_rng(seed).standard_normal((2, 30))
            step(g.astype(np.float32))
        weights.append(variable.numpy())
    np.testing.assert_array_equal(*weights)
    assert optimizer.wire_report().index_code == "Complement"


def test_index_codecs_that_cannot_be_saved():
    class Unknown(Complement):
        pass

    with pytest.raises(ValueError, match="must be registered with"):
        tf_regtopk.Codec(Unknown)
    with pytest.raises(TypeError, match="a subclass of `IndexCodec`"):
        tf_regtopk.Codec(int)
