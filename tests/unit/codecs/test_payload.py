"""Payloads: what several replicas send, hostile words, codecs of the user."""

import dataclasses

import compiled_codecs
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
from tf_regtopk.codecs import index_codecs
from tf_regtopk.kernels import device_kind


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
    decoded, sent, is_valid = compiled_codecs.compiled(codec.decode)(
        tf.stack(payloads)
    )
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

    `tests/soak/fuzz_payloads.py` does the same with a million.
    """
    codec = tf_regtopk.Codec(name, "natural").payload(k, size)
    decode = compiled_codecs.compiled(codec.decode)
    valid, _ = codec.encode(
        tf.constant(np.arange(k) * (size // k), tf.int32),
        tf.ones([k]),
        compiled_codecs.STREAM,
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
            tf.constant(indices, tf.int32), tf.ones([k]), compiled_codecs.STREAM
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


@dataclasses.dataclass(frozen=True)
class Lying(tf_regtopk.ValueCodec):
    """Half precision of a number of words that is not its own."""

    said: int = 3
    decoded: int = 4

    def num_words(self, k, dtype):
        return self.said

    def encode(self, values, stream):
        return tf.bitcast(
            tf.reshape(tf.cast(values, tf.float16), [-1, 2]), "uint32"
        )

    def decode(self, words, k, dtype):
        return tf.zeros([self.decoded], dtype)


@pytest.mark.parametrize(
    "values, match",
    [
        (
            Lying(),
            r"`Lying.encode` must return a uint32 tensor of as many words as "
            r"`num_words` says, 3. Received: dtype=uint32, shape=\(2,\)",
        ),
        (
            Lying(2, 5),
            r"`Lying.decode` must return a tensor of shape \(4,\) and dtype "
            r"float32. Received: shape=\(5,\)",
        ),
    ],
)
def test_a_codec_that_is_wrong_about_itself(values, match):
    codec = tf_regtopk.Codec("int32", values).payload(4, 100)
    with pytest.raises(ValueError, match=match):
        codec.encode(tf.range(4), tf.ones([4]), (0, 0))


def test_an_index_codec_that_is_wrong_about_itself():
    @keras.saving.register_keras_serializable("test_payload")
    class Short(tf_regtopk.IndexCodec):
        @property
        def num_words(self):
            return self.k + 1

        def encode(self, indices):
            return tf.bitcast(indices, tf.uint32)

        def decode(self, words):
            return tf.bitcast(words, tf.int32), tf.constant(True)

    codec = tf_regtopk.Codec(Short).payload(4, 100)
    with pytest.raises(ValueError, match="`Short.encode` must return.*says, 5"):
        codec.encode(tf.range(4), tf.ones([4]), (0, 0))
