"""Value codecs: rounding, extremes, and what is decoded."""

import functools

import compiled_codecs
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.codecs import value_codecs

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
        compiled_codecs.compiled(codec.encode),
        compiled_codecs.compiled(lambda words: codec.decode(words, k, dtype)),
    )


def code(codec, values, stream=compiled_codecs.STREAM, dtype=tf.float32):
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


def test_natural_compression_knows_no_small_and_no_denormal_values():
    decoded = code(VALUES["natural"], [1e30, 1, 1e-10, -1e-30, 1e-40])
    assert not decoded[2:].any()
    assert 5e29 < decoded[0] < 2e30 and decoded[1] in (1, 2)
    # Denormal values also of those that are not small beside the largest.
    assert not code(VALUES["natural"], [1e-37, 1e-38, -1e-40])[1:].any()


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


def test_stc_takes_nine_bits_an_entry():
    size, k = 1_000_000, 10_000
    codec = tf_regtopk.Codec("golomb", "ternary").payload(k, size)
    rng = np.random.default_rng(0)
    payload, _ = codec.encode(
        tf.constant(np.sort(rng.choice(size, k, replace=False)), tf.int32),
        tf.constant(rng.standard_normal(k), tf.float32),
        compiled_codecs.STREAM,
    )
    assert 32 * int(codec.num_used(payload)) / k == pytest.approx(9.1, abs=0.1)
