"""Shares of the entries, and the grouping by owner."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import reference
import tensorflow as tf

from tf_regtopk.kernels import ownership as ownership_lib


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20))
def test_each_entry_has_one_owner_and_one_position(size, num_owners):
    ownership = ownership_lib.Ownership(size, num_owners)
    owners, positions = ownership.of(tf.range(size))
    expected = np.arange(size) // num_owners
    np.testing.assert_array_equal(positions, expected)
    hashes = reference.mix(expected) >> 9
    np.testing.assert_array_equal(
        owners, (np.arange(size) + hashes) % num_owners
    )
    assert ownership.share == expected[-1] + 1
    np.testing.assert_array_equal(
        ownership.entries(owners, positions), np.arange(size)
    )
    # The shares differ by one entry at most.
    counts = np.bincount(owners, minlength=num_owners)
    assert counts.max() - counts.min() <= 1


def test_equal_distances_have_many_owners():
    """The weights of one of 10 outputs are not all of one of 5 owners."""
    owners, _ = ownership_lib.Ownership(5000, 5).of(tf.range(3, 5000, 10))
    counts = np.bincount(owners, minlength=5)
    assert counts.min() > 60, counts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=200))
def test_grouping_is_a_stable_sort(owners):
    places, counts = ownership_lib.grouped(tf.constant(owners, tf.int32), 13)
    np.testing.assert_array_equal(places, np.argsort(owners, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(owners, minlength=13))


def test_grouping_of_many():
    owners = np.random.default_rng(0).integers(0, 1000, 20_000)
    places, counts = tf.function(ownership_lib.grouped, jit_compile=True)(
        tf.constant(owners, tf.int32), 1000
    )
    np.testing.assert_array_equal(places, np.argsort(owners, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(owners, minlength=1000))
