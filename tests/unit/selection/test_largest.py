"""Selection of exactly the k largest, against NumPy."""

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import selection_check
import tensorflow as tf

from tf_regtopk import selection

# Compiled once for each of these shapes, and run on many inputs.
GROUPS = {
    "one": [selection.Group(1, 1)],
    "all": [selection.Group(33, 33)],
    "odd": [selection.Group(101, 17)],
    "groups": [
        selection.Group(1, 1),
        selection.Group(64, 5),
        selection.Group(31, 31),
        selection.Group(7, 1),
        selection.Group(33, 32),
    ],
}


def scores_of(size):
    """Arrays of scores, most of them full of ties in magnitude."""
    few_values = st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1.5, -1e37, 1e37, 1e-30, 3.0, 1e-45]
    )
    any_value = st.floats(-(2.0**127), 2.0**127, width=32)
    return st.one_of(
        st.lists(few_values, min_size=size, max_size=size),
        st.lists(any_value, min_size=size, max_size=size),
        any_value.map(lambda value: [value] * size),
    )


@pytest.mark.parametrize("dtype", selection_check.DTYPES)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("mode", selection_check.MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_scores(name, dtype, mode, data):
    groups = GROUPS[name]
    scores = data.draw(scores_of(sum(group.size for group in groups)))
    selection_check.check(
        np.array(scores, dtype), groups, selection_check.MODES[mode]
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6), data=st.data()
)
@example(sizes=[32, 32], data=None)
def test_any_groups(sizes, data):
    rng = np.random.default_rng(sum(sizes))
    groups = [
        selection.Group(
            size, data.draw(st.integers(1, size)) if data else size // 2
        )
        for size in sizes
    ]
    scores = rng.integers(0, 20, sum(sizes)).astype(np.float32)
    selection_check.check(scores, groups, selection_check.select)


def test_smallest_and_largest_numbers():
    scores = np.array([0.0, np.finfo(np.float32).max, np.inf, 1e-38], "f4")
    for k in range(1, 5):
        selection_check.check(
            scores, [selection.Group(4, k)], selection_check.select
        )


def test_denormals_keep_k_exact():
    scores = np.arange(100, dtype=np.float32) * np.float32(1e-45)
    selection_check.check(scores, [selection.Group(100, 7)])


def test_nan_counts_as_largest():
    scores = np.array([1.0, np.nan, np.inf, -np.nan], np.float32)
    actual = selection_check.compiled_select(
        tf.constant(scores), [selection.Group(4, 2)]
    )
    assert actual.numpy().tolist() == [1, 3]


@pytest.mark.parametrize(
    "size, k", [(524288, 1000), (1000000, 1000), (70001, 70001), (65536, 1)]
)
def test_large_inputs(size, k):
    """Sizes for which XLA's own top_k went wrong, and edges of the digits."""
    scores = np.random.default_rng(k).permutation(size).astype(np.float32)
    selection_check.check(scores, [selection.Group(size, k)])


def test_many_groups():
    rng = np.random.default_rng(0)
    groups = [
        selection.Group(size, max(1, size // 10))
        for size in rng.integers(1, 400, 60).tolist()
    ]
    scores = rng.standard_exponential(sum(g.size for g in groups))
    selection_check.check(scores.astype(np.float32), groups)
