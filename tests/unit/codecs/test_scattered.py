"""Entries that go to their owners, and the sums that come back."""

import collections
import functools

import compiled_codecs
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import codecs
from tf_regtopk.kernels import ownership
from tf_regtopk.sizes import payload as sizes

Exchange = collections.namedtuple(
    "Exchange", ["sent", "total", "kept", "facts", "is_valid"]
)


def codec_of(
    size, k, n, capacity=1.5, keep=1.0, values="float32", dtype="float32"
):
    return codecs.ScatteredCodec.of(
        tf_regtopk.Codec(values=values),
        ownership.Ownership(size, n),
        k,
        capacity,
        keep,
        tf.as_dtype(dtype),
    )


def random_entries(rng, size, k, n, dtype="float32"):
    """Rising indices and values `[n, k]`, which share about half."""
    common = rng.permutation(size)[: k // 2]
    indices = []
    for _ in range(n):
        rest = np.setdiff1d(np.arange(size), common)
        own = rng.choice(rest, k - len(common), replace=False)
        indices.append(np.sort(np.concatenate([common, own])))
    values = rng.standard_normal((n, k)).astype(dtype)
    return np.array(indices, np.int32), values


@functools.cache
def functions_of(codec):
    """`(encode, reduce, decode)`, compiled."""
    functions = (
        lambda i, v, *stream: codec.encode(i, v, stream),
        codec.reduce,
        codec.decode,
    )
    return tuple(map(compiled_codecs.compiled, functions))


def exchange(codec, indices, values, step=0):
    """All of a step between `send` and `settle`, as N participants see it."""
    n, size = codec.ownership.num_owners, codec.size
    encode, reduce, decode = functions_of(codec)
    step, ranks = tf.constant(step), [tf.constant(rank) for rank in range(n)]
    payloads, sent = zip(
        *(
            encode(tf.constant(i), tf.constant(v), step, rank)
            for i, v, rank in zip(indices, values, ranks, strict=True)
        ),
        strict=True,
    )
    received = np.reshape(payloads, [n, n, -1]).swapaxes(0, 1)
    # TensorFlow may give them in any order.
    order = np.random.default_rng(0).permutation(n)
    received = received[order][:, order]
    payloads, kept = zip(
        *(reduce(tf.constant(words), step) for words in received), strict=True
    )
    payloads = tf.stack(payloads)
    assert payloads.shape[1] == codec.num_words_to_all
    decoded, decoded_values, is_valid = decode(payloads)
    total = np.zeros(size)
    np.add.at(total, decoded, decoded_values)
    return Exchange(
        np.array(sent), total, kept, codec.facts(payloads), is_valid.numpy()
    )


def sums_of(indices, values, size):
    total = np.zeros(size)
    np.add.at(total, indices, values.astype(np.float64))
    return total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size, k, n", [(101, 30, 3), (64, 64, 4), (40, 3, 5)])
def test_with_room_for_all_it_is_the_sum(size, k, n, dtype):
    indices, values = random_entries(
        np.random.default_rng(0), size, k, n, dtype
    )
    codec = codec_of(size, k, n, capacity=n, keep=n, dtype=dtype)
    found = exchange(codec, indices, values)
    np.testing.assert_array_equal(found.sent, values)
    np.testing.assert_allclose(
        found.total, sums_of(indices, values, size), rtol=1e-6, atol=1e-6
    )
    assert found.is_valid.all()
    assert not any(kept.error.numpy().any() for kept in found.kept)
    assert found.facts.num_accepted == n * k
    np.testing.assert_allclose(
        found.facts.magnitudes, np.abs(values).sum(), rtol=1e-5
    )


@pytest.mark.parametrize(
    "values_codec, keep",
    [
        ("float32", 0.5),
        ("natural", 1.0),
        ("sign", 2.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("float32", 1.0),
                ("float32", 2.0),
                ("natural", 0.5),
                ("natural", 2.0),
                ("sign", 0.5),
                ("sign", 1.0),
            ]
        ),
    ],
)
def test_nothing_is_lost(values_codec, keep):
    """What was sent is in the total, or was dropped where all can tell."""
    size, k, n = 203, 40, 4
    rng = np.random.default_rng(1)
    codec = codec_of(size, k, n, keep=keep, values=values_codec)
    for step in range(5):
        indices, values = random_entries(rng, size, k, n)
        found = exchange(codec, indices, values, step)
        is_accepted = found.total[indices] != 0
        arrived = sums_of(indices, np.where(is_accepted, found.sent, 0.0), size)
        errors = np.zeros(size)
        for kept in found.kept:
            assert len(np.unique(kept.indices)) == codec.to_all.k
            np.add.at(errors, kept.indices, kept.error)
        np.testing.assert_allclose(
            found.total + errors, arrived, rtol=1e-5, atol=1e-5
        )
        assert found.facts.num_accepted == is_accepted.sum()
        np.testing.assert_allclose(
            found.facts.magnitudes,
            np.abs(found.sent[is_accepted]).sum(),
            rtol=1e-5,
        )
        if values_codec == "float32":
            assert not errors.any()


def test_an_owner_keeps_its_largest_sums():
    size, k, n = 203, 40, 4
    indices, values = random_entries(np.random.default_rng(2), size, k, n)
    codec = codec_of(size, k, n, capacity=n)
    found = exchange(codec, indices, values)
    sums = sums_of(indices, values, size)
    owners, _ = codec.ownership.of(tf.range(size))
    for owner in range(n):
        own = np.flatnonzero(owners == owner)
        expected = own[np.argsort(-np.abs(sums[own]))[: k // n]]
        assert set(np.flatnonzero(found.total[own])) == set(
            np.searchsorted(own, expected)
        )


def test_a_sender_leaves_out_what_has_no_room_in_turn():
    """Of entries that are all one owner's each is sent sooner or later."""
    size, k, n = 400, 20, 4
    codec = codec_of(size, k, n, capacity=1.0, keep=n)
    own = codec.ownership.entries(2, tf.range(0, 100, 5)).numpy()
    indices = np.tile(own.astype(np.int32), (n, 1))
    values = np.ones((n, k), np.float32)
    counts = np.zeros(k, int)
    for step in range(30):
        found = exchange(codec, indices, values, step)
        is_sent = found.sent[0] != 0
        assert is_sent.sum() == codec.to_owner.k == k // n
        counts += is_sent
    assert counts.min() > 0


def test_fillers_change_no_magnitude():
    """Signs of equal magnitude stay as they are, however few there are."""
    size, k, n = 400, 20, 4
    codec = codec_of(size, k, n, capacity=n, keep=n, values="sign")
    own = codec.ownership.entries(1, tf.range(0, 100, 5)).numpy()
    indices = np.tile(own.astype(np.int32), (n, 1))
    values = np.full((n, k), -2.0, np.float32)
    found = exchange(codec, indices, values)
    np.testing.assert_allclose(found.sent, values, rtol=1e-6)
    np.testing.assert_allclose(
        found.total, sums_of(indices, values, size), rtol=1e-6
    )


def test_entries_are_rounded_unlike_any_others():
    """Of each step, sender and owner; and sums of each step."""
    size, k, n = 400, 120, 3
    codec = codec_of(size, k, n, capacity=n, keep=n, values="natural")
    encode, reduce, _ = functions_of(codec)
    indices, values = tf.range(k), tf.fill([k], 1.37)
    owners, _ = codec.ownership.of(indices)
    draws, errors = set(), set()
    for step in map(tf.constant, (0, 1)):
        for rank in range(n):
            words, sent = encode(indices, values, step, tf.constant(rank))
            for owner in range(n):
                draws.add(sent[owners == owner][:30].numpy().tobytes())
        words = codec.encode(indices, values, (0, 0))[0]
        _, kept = reduce(tf.stack([tf.split(words, n)[0]] * n), step)
        errors.add(kept.error.numpy().tobytes())
    assert (len(draws), len(errors)) == (2 * n * n, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_sums_show_what_is_not_finite(bad):
    size, k, n = 101, 30, 3
    indices, values = random_entries(np.random.default_rng(3), size, k, n)
    values[1, 7] = bad
    found = exchange(codec_of(size, k, n, capacity=n), indices, values)
    assert not all(np.isfinite(kept.sums).all() for kept in found.kept)


def test_hostile_payloads():
    """Whatever arrives, indices stay in the gradient, and wrong ones show."""
    size, k, n = 101, 30, 3
    codec = codec_of(size, k, n)
    rng = np.random.default_rng(4)
    _, reduce, decode = functions_of(codec)
    for _ in range(20):
        words = rng.integers(-(2**31), 2**31, [n, codec.num_words_to_owner])
        payload, kept = reduce(tf.constant(words, tf.int32), tf.constant(0))
        assert 0 <= payload[0] < n and payload[1] == -1
        assert np.all((kept.indices >= 0) & (kept.indices < size))
        _, _, is_valid = decode(tf.stack([payload] * n))
        assert not is_valid.numpy().any()
        words = rng.integers(-(2**31), 2**31, [n, codec.num_words_to_all])
        indices, _, _ = decode(tf.constant(words, tf.int32))
        assert np.all((indices >= 0) & (indices < size))


def test_words_for_another_owner_are_seen():
    size, k, n = 101, 30, 3
    codec = codec_of(size, k, n)
    encode, reduce, decode = functions_of(codec)
    indices, values = random_entries(np.random.default_rng(5), size, k, n)
    payload, _ = encode(
        tf.constant(indices[0]),
        tf.constant(values[0]),
        tf.constant(0),
        tf.constant(0),
    )
    rows = tf.reshape(payload, [n, -1])
    mine, _ = reduce(tf.stack([rows[1]] * n), tf.constant(0))
    assert mine[0] == 1 and mine[1] >= 0
    mixed, _ = reduce(tf.stack([rows[1], rows[2], rows[1]]), tf.constant(0))
    assert mixed[1] == -1
    # Two owners of the same entries.
    _, _, is_valid = decode(tf.stack([mine] * n))
    assert not is_valid.numpy().any()


def test_too_many_entries():
    with pytest.raises(ValueError, match="`topology` must be another one"):
        codec_of(2**31 - 1, 1000, 1000)


def test_lengths():
    codec = codec_of(size=100_000, k=1000, n=8, capacity=1.5, keep=2.0)
    assert (codec.to_owner.k, codec.to_all.k) == (188, 250)
    assert codec.num_words == 8 * (1 + codec.to_owner.num_words)
    # An owner has no more than its share, and all sums of few entries.
    codec = codec_of(size=10, k=9, n=5, capacity=4.0, keep=5.0)
    assert (codec.to_owner.k, codec.to_all.k) == (2, 2)
    codec = codec_of(100_000, 1000, n=8, capacity=1e306, keep=1e306)
    assert (codec.to_owner.k, codec.to_all.k) == (1000, 8000)
    codec = codec_of(size=100, k=1, n=5)
    assert (codec.to_owner.k, codec.to_all.k) == (1, 1)
    assert sizes.NUM_FACTS + codec.to_all.num_words == codec.num_words_to_all
