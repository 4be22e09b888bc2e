"""RegTop-k's score."""

import math

import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

STEP = tf.constant(0, tf.int64)


def test_memory_of_another_gradient():
    sparsifier = tf_regtopk.RegTopK()
    delta = np.full(2, np.nan)
    assert sparsifier.is_valid_memory([np.array([0, 9]), delta], 10)
    assert not sparsifier.is_valid_memory([np.array([0, 10]), delta], 10)
    assert not sparsifier.is_valid_memory([np.array([-1, 9]), delta], 10)


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


def test_reg_top_k_counts_what_it_damps_and_selects_again():
    sparsifier = tf_regtopk.RegTopK(0.5)
    a = tf.ones([6])
    # Nothing was sent before the first step.
    memory = sparsifier.initial_memory(3, 6, tf.float32)
    counts = sparsifier.measure(a, memory, tf.constant([0, 1, 2]))
    np.testing.assert_array_equal(counts, [0, 0])
    # Of the sums over what was sent, 0.25 and -0.25 are below a half.
    memory = sparsifier.remember(
        (),
        tf.constant([0, 2, 3, 4]),
        tf.constant([4.0, 4.0, -4.0, 1.0]),
        tf.constant([1.0, 3.0, 1.0, -2.0]),
        STEP,
    )
    counts = sparsifier.measure(a, memory, tf.constant([0, 1, 4]))
    np.testing.assert_array_equal(counts, [2, 2])


def test_scores_at_the_largest_mu_are_finite():
    """Where all that is divided by mu is as small as it can be."""
    sparsifier = tf_regtopk.RegTopK(0.5, mu=1e30, q=0)
    memory = tf.constant([0, 1]), tf.constant([2.0, 0.0])
    scores = sparsifier.score(
        tf.constant([1.0, 2.0, 3.0, 4.0]), memory, tf.constant(1)
    )
    # Of so small numbers tanh is the number itself.
    np.testing.assert_allclose(scores, [2.0, 0.0, 3.0, 4.0], rtol=1e-5)


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mu": 0}, "`mu` must be from 1e-37 .* Received: mu=0"),
        ({"mu": 1e60}, "`mu` must be .* to 1e30. Received: mu=1e"),
        ({"mu": -1.0}, "`mu` must be from 1e-37 .* Received: mu=-1"),
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
