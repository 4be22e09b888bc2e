"""The score functions and their records of hyper-parameters."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import sparsifiers

ALL = [
    tf_regtopk.TopK(0.25),
    tf_regtopk.RegTopK(0.25, mu=2.0, q=3.0, denominator="current"),
    tf_regtopk.RandomK(0.25, seed=7),
]
STEP = tf.constant(0, tf.int64)


def test_defaults():
    assert dataclasses.asdict(tf_regtopk.RegTopK()) == {
        "density": 0.001,
        "mu": 4.0,
        "q": 1e8,
        "denominator": "previous",
    }
    assert tf_regtopk.TopK().density == 0.001
    assert dataclasses.asdict(tf_regtopk.RandomK()) == {
        "density": 0.001,
        "seed": 0,
    }


@pytest.mark.parametrize("sparsifier", ALL)
def test_records_are_immutable_values(sparsifier):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparsifier.density = 0.5
    assert sparsifier == dataclasses.replace(sparsifier)
    assert hash(sparsifier) == hash(dataclasses.replace(sparsifier))
    assert sparsifier != dataclasses.replace(sparsifier, density=0.5)


@pytest.mark.parametrize("sparsifier", ALL)
def test_config_round_trip(sparsifier):
    config = keras.saving.serialize_keras_object(sparsifier)
    assert keras.saving.deserialize_keras_object(config) == sparsifier


def test_number_of_entries():
    assert tf_regtopk.TopK(0.001).num_selected(100) == 1
    assert tf_regtopk.TopK(0.01).num_selected(1049) == 10
    assert tf_regtopk.TopK(0.01).num_selected(1051) == 11
    assert tf_regtopk.TopK(1).num_selected(7) == 7
    for size in range(1, 50):
        for density in (1e-9, 0.3, 0.999999, 1.0):
            assert 1 <= tf_regtopk.TopK(density).num_selected(size) <= size


def test_reg_top_k_damps_what_the_others_cancel():
    """Two steps by hand: ratios 0, 1/2, 1, 2 and -1 of sum to own part."""
    sparsifier = tf_regtopk.RegTopK(0.8, mu=0.5)
    sent = tf.constant([4.0, 4.0, -4.0, 4.0, 4.0], tf.float64)
    summed = tf.constant([0.0, 2.0, -4.0, 8.0, -4.0], tf.float64)
    indices = tf.constant([0, 1, 2, 4, 5])
    memory = sparsifier.remember((), indices, sent, summed, STEP)
    a = tf.constant([10.0, -10.0, 10.0, 10.0, 10.0, 10.0], tf.float64)
    np.testing.assert_allclose(
        sparsifier.score(a, memory, STEP),
        [
            0.0,
            -10 * math.tanh(1.0),
            10 * math.tanh(2.0),
            10.0,
            10 * math.tanh(4.0),
            10 * math.tanh(2.0),
        ],
        rtol=1e-12,
    )


def test_reg_top_k_with_the_current_denominator():
    sparsifier = tf_regtopk.RegTopK(0.5, mu=0.5, denominator="current")
    # The others sent -1 for entry 0 and +3 for entry 2.
    memory = sparsifier.remember(
        (),
        tf.constant([0, 2]),
        tf.constant([1.0, 1.0]),
        tf.constant([0.0, 4.0]),
        STEP,
    )
    a = tf.constant([2.0, 2.0, -6.0, 0.0])
    np.testing.assert_allclose(
        sparsifier.score(a, memory, STEP),
        [2 * math.tanh(1.0), 2.0, -6 * math.tanh(1.0), 0.0],
        rtol=1e-6,
    )


@pytest.mark.parametrize("denominator", ["previous", "current"])
def test_reg_top_k_where_the_ratio_is_not_defined(denominator):
    """At first, and where 0 was sent, entries count as not sent."""
    sparsifier = tf_regtopk.RegTopK(0.5, mu=2.0, denominator=denominator)
    a = tf.constant([3.0, 0.0, 1.0])
    memory = sparsifier.initial_memory(2, 3, tf.float32)
    np.testing.assert_array_equal(sparsifier.score(a, memory, STEP), a)
    memory = sparsifier.remember(
        (),
        tf.constant([0, 1]),
        tf.constant([0.0, 0.0]),
        tf.constant([0.0, 0.0]),
        STEP,
    )
    scores = sparsifier.score(a, memory, STEP).numpy()
    if denominator == "previous":
        np.testing.assert_array_equal(scores, a)
    assert np.isfinite(scores).all()


def test_an_entry_sent_as_zero_counts_as_not_sent():
    sparsifier = tf_regtopk.RegTopK(0.5, mu=2.0, q=0.5)
    memory = sparsifier.remember(
        (),
        tf.constant([0]),
        tf.constant([0.0]),
        tf.constant([3.0]),
        STEP,
    )
    a = tf.constant([4.0, 4.0])
    scores = sparsifier.score(a, memory, STEP).numpy()
    np.testing.assert_array_equal(scores, a)


def test_small_mu_is_top_k():
    rng = np.random.default_rng(0)
    a = tf.constant(rng.standard_normal(50))
    sparsifier = tf_regtopk.RegTopK(0.2, mu=1e-6)
    memory = sparsifier.remember(
        (),
        tf.range(10),
        tf.constant(rng.standard_normal(10)),
        tf.constant(rng.standard_normal(10)),
        STEP,
    )
    np.testing.assert_allclose(sparsifier.score(a, memory, STEP), a, rtol=1e-12)


def test_random_k_follows_the_reference():
    for seed, step in ((0, 0), (7, 3), (2**40 + 1, 10**6)):
        np.testing.assert_array_equal(
            sparsifiers.random_k_score(
                200, seed, tf.constant(step, tf.int64), tf.float64
            ),
            reference.random_scores(200, seed % 2**32, step),
        )


@pytest.mark.slow
def test_random_k_takes_every_entry_equally_often():
    size, steps, k = 64, 2000, 8
    counts = np.zeros(size)
    together = 0
    for step in range(steps):
        scores = sparsifiers.random_k_score(
            size, 5, tf.constant(step, tf.int64), tf.float32
        )
        chosen = reference.largest(scores.numpy(), k)
        counts[chosen] += 1
        together += {0, 1} <= set(chosen.tolist())
    mean = steps * k / size
    deviation = np.sqrt(steps * k / size * (1 - k / size))
    assert np.abs(counts - mean).max() < 5 * deviation
    pair_mean = steps * k / size * (k - 1) / (size - 1)
    assert abs(together - pair_mean) < 5 * np.sqrt(pair_mean)


def test_random_k_depends_on_seed_and_step():
    def scores(seed, step):
        return sparsifiers.random_k_score(
            1000, seed, tf.constant(step, tf.int64), tf.float32
        ).numpy()

    for other in (scores(1, 1), scores(0, 2), scores(1, 0)):
        assert abs(np.corrcoef(scores(0, 1), other)[0, 1]) < 0.15


@pytest.mark.parametrize(
    "make", [tf_regtopk.TopK, tf_regtopk.RegTopK, tf_regtopk.RandomK]
)
@pytest.mark.parametrize(
    "density", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.1", None]
)
def test_bad_density(make, density):
    with pytest.raises(
        (ValueError, TypeError),
        match=r"`density` must be in \(0, 1\]. Received: density=",
    ):
        make(density=density)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mu": 0}, "`mu` must be a positive number. Received: mu=0"),
        ({"mu": -1.0}, "`mu` must be a positive number. Received: mu=-1.0"),
        ({"mu": math.nan}, "`mu` must be .* Received: mu=nan"),
        ({"mu": True}, "`mu` must be .* Received: mu=True"),
        ({"q": -1}, "`q` must be a non-negative number. Received: q=-1"),
        ({"q": "1"}, "`q` must be a non-negative number. Received: q='1'"),
        (
            {"denominator": "next"},
            '`denominator` must be "previous" or "current". '
            "Received: denominator='next'",
        ),
    ],
)
def test_bad_reg_top_k_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tf_regtopk.RegTopK(**arguments)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_bad_seed(seed):
    with pytest.raises(
        (ValueError, TypeError), match="`seed` must be an integer >= 0"
    ):
        tf_regtopk.RandomK(seed=seed)


def test_numpy_numbers_are_numbers():
    assert tf_regtopk.TopK(np.float32(0.5)).num_selected(10) == 5
    assert tf_regtopk.RandomK(seed=np.int64(3)).seed == 3


def test_a_method_of_version_0_1_0_is_refused():
    """When the class is defined, with the signature to write."""
    with pytest.raises(
        TypeError, match=r"write `def remember\(self, memory, indices, sent"
    ):

        class Old(tf_regtopk.TopK):
            def remember(self, indices, sent, aggregate):
                return (indices,)

    with pytest.raises(TypeError, match=r"`OldRule.update` must take"):

        class OldRule(tf_regtopk.Accumulate):
            def update(self, local, indices, sent, step):
                return local
