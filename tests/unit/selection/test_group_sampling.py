"""Bounds from a sample of several groups at once."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import selection_check
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.selection import group_sampling

# Some are sampled, and some share a word of 32 scores with others.
LARGE_GROUP_SIZES = [8192, 3, 1, 5, 70001, 17, 32, 8191, 64, 33333, 20000]


def large_groups(density):
    return [
        selection.Group(size, max(1, round(density * size)))
        for size in LARGE_GROUP_SIZES
    ]


@pytest.mark.parametrize(
    "mode, dtype",
    [
        *(
            (mode, dtype)
            for mode in ("eager", "graph", "xla")
            for dtype in selection_check.DTYPES
        ),
        ("as on GPUs", np.float32),
    ],
)
@pytest.mark.parametrize(
    "density", [0.0005, pytest.param(0.01, marks=pytest.mark.slow)]
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_sampling_of_groups_never_changes_the_result(
    density, mode, dtype, data
):
    groups = large_groups(density)
    assert group_sampling.plan(groups)
    selection_check.check(
        selection_check.draw_large_scores(data, sum(LARGE_GROUP_SIZES), dtype),
        groups,
        selection_check.MODES[mode],
    )


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.001, 0.02])
def test_sampling_of_groups_nearly_always_pays(density):
    """Far more groups than in a network; one that fails is felt by all."""
    groups = [selection.Group(8200, max(1, round(density * 8200)))] * 300
    size = sum(group.size for group in groups)
    sample = tf.function(
        lambda scores, step: group_sampling.candidates(scores, groups, step),
        jit_compile=True,
        autograph=False,
    )
    scores = selection_check.layered_scores(np.random.default_rng(0), size)
    found = [sample(tf.constant(scores), tf.constant(i)) for i in range(40)]
    assert sum(bool(f.suffice) for f in found) >= 39
    room = group_sampling.plan(groups).room
    assert all(0.2 * room < int(f.number) < room for f in found)
    assert len({int(f.number) for f in found}) > 30  # Each step anew.


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_groups_are_not_sampled_where_that_does_not_pay(density):
    assert group_sampling.plan(large_groups(density)) is None
