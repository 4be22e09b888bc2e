"""Exactly k entries, the largest ones, lower positions first in ties."""

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.kernels import device_kind
from tf_regtopk.selection import group_sampling
from tf_regtopk.selection import largest
from tf_regtopk.selection import sampling

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
DTYPES = [np.float32, np.float64]


def select(scores, groups):
    return selection.select_largest(scores, groups)


compiled_select = tf.function(select, jit_compile=True, autograph=False)


@tf.function(jit_compile=True, autograph=False)
def select_as_on_gpu(scores, groups):
    with device_kind.compile_for("GPU"):
        return select(scores, groups)


MODES = {
    "eager": select,
    "graph": tf.function(select, autograph=False),
    "xla": compiled_select,
    "as on GPUs": select_as_on_gpu,
}


def expected(scores, groups):
    scores = np.abs(scores)
    positions, start = [], 0
    for size, k in groups:
        part = scores[start : start + size]
        positions.append(start + reference.largest(part, k))
        start += size
    return np.concatenate(positions)


def check(scores, groups, select_fn=compiled_select):
    actual = select_fn(tf.constant(scores), groups)
    assert actual.dtype == tf.int32
    np.testing.assert_array_equal(actual, expected(scores, groups))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_scores(name, dtype, mode, data):
    groups = GROUPS[name]
    scores = data.draw(scores_of(sum(group.size for group in groups)))
    check(np.array(scores, dtype), groups, MODES[mode])


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
    check(scores, groups, select)


def test_smallest_and_largest_numbers():
    scores = np.array([0.0, np.finfo(np.float32).max, np.inf, 1e-38], "f4")
    for k in range(1, 5):
        check(scores, [selection.Group(4, k)], select)


def test_denormals_keep_k_exact():
    scores = np.arange(100, dtype=np.float32) * np.float32(1e-45)
    check(scores, [selection.Group(100, 7)])


def test_nan_counts_as_largest():
    scores = np.array([1.0, np.nan, np.inf, -np.nan], np.float32)
    actual = compiled_select(tf.constant(scores), [selection.Group(4, 2)])
    assert actual.numpy().tolist() == [1, 3]


@pytest.mark.parametrize(
    "size, k", [(524288, 1000), (1000000, 1000), (70001, 70001), (65536, 1)]
)
def test_large_inputs(size, k):
    """Sizes for which XLA's own top_k went wrong, and edges of the digits."""
    scores = np.random.default_rng(k).permutation(size).astype(np.float32)
    check(scores, [selection.Group(size, k)])


LARGE = 2**17 + 77  # Sampled, and no multiple of anything.


def layered_scores(rng, size):
    """Runs of very different scale, as the layers of a network."""
    scale = np.exp(2 * rng.standard_normal(size // 1000 + 1)).repeat(1000)
    return np.abs(rng.standard_normal(size) * scale[:size]).astype(np.float32)


LARGE_SCORES = {
    "normal": lambda rng, size: np.abs(rng.standard_normal(size)),
    "layers": layered_scores,
    "ties": lambda rng, size: rng.integers(0, 3, size),
    "few_ties": lambda rng, size: np.floor(5 * rng.standard_exponential(size)),
    "zeros": lambda rng, size: np.zeros(size),
    "constant": lambda rng, size: np.full(size, 1e37),
    "spike": lambda rng, size: np.where(np.arange(size) == 98765, 2.0, 0.0),
    "rising": lambda rng, size: np.arange(size),
    "every_96th": lambda rng, size: (
        (np.arange(size) % 96 == 0) + rng.random(size)
    ),
    "infinite": lambda rng, size: np.where(
        rng.random(size) < 0.01, np.inf, 1.0
    ),
}


def draw_large_scores(data, size, dtype=np.float32):
    name = data.draw(st.sampled_from(sorted(LARGE_SCORES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = LARGE_SCORES[name](rng, size) * rng.choice([-1.0, 1.0], size)
    scores[rng.integers(size, size=data.draw(st.integers(0, 3)))] = 1e37
    return scores.astype(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "k",
    [
        131,
        LARGE // 2,
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in (1, 13107, LARGE - 1)
        ),
    ],
)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_sampling_never_changes_the_result(k, mode, data):
    scores = draw_large_scores(data, LARGE)
    check(scores, [selection.Group(LARGE, k)], MODES[mode])


def test_every_step_samples_anew_and_selects_the_same():
    rng = np.random.default_rng(0)
    groups = [selection.Group(LARGE, 1311)]
    compiled = tf.function(
        lambda scores, step: selection.select_largest(scores, groups, step),
        jit_compile=True,
        autograph=False,
    )
    for make in LARGE_SCORES.values():
        scores = make(rng, LARGE).astype(np.float32)
        for step in range(3):
            np.testing.assert_array_equal(
                compiled(tf.constant(scores), tf.constant(step)),
                expected(scores, groups),
            )


@pytest.mark.parametrize("chunk", [1000, LARGE // 3, LARGE - 1])
def test_all_scores_are_searched_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(largest, "_CHUNK", chunk)
    scores = LARGE_SCORES["few_ties"](np.random.default_rng(0), LARGE)
    check(scores.astype(np.float32), [selection.Group(LARGE, 40001)], select)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, density",
    [("CPU", 0.001), ("CPU", 0.01), ("CPU", 0.1), ("GPU", 0.01), ("GPU", 0.1)],
)
def test_sampling_nearly_always_pays(kind, density):
    """The sampled bounds leave the k-th largest, and not too many others.

    On layers of different scale, and where few entries stand out in a pattern.
    """
    group = selection.Group(LARGE, round(density * LARGE))

    @tf.function(jit_compile=True, autograph=False)
    def suffices(scores, step):
        with device_kind.compile_for(kind):
            return sampling.candidates(scores, group, step).suffice

    rng = np.random.default_rng(0)
    misses = 0
    for step in range(100):
        make = LARGE_SCORES[("layers", "every_96th")[step % 2]]
        scores = tf.constant(make(rng, LARGE).astype(np.float32))
        misses += not suffices(scores, tf.constant(step))
    assert misses <= 2


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
            for dtype in DTYPES
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
    check(
        draw_large_scores(data, sum(LARGE_GROUP_SIZES), dtype),
        groups,
        MODES[mode],
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
    scores = layered_scores(np.random.default_rng(0), size)
    found = [sample(tf.constant(scores), tf.constant(i)) for i in range(40)]
    assert sum(bool(f.suffice) for f in found) >= 39
    room = group_sampling.plan(groups).room
    assert all(0.2 * room < int(f.number) < room for f in found)
    assert len({int(f.number) for f in found}) > 30  # Each step anew.


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_groups_are_not_sampled_where_that_does_not_pay(density):
    assert group_sampling.plan(large_groups(density)) is None


def test_many_groups():
    rng = np.random.default_rng(0)
    groups = [
        selection.Group(size, max(1, size // 10))
        for size in rng.integers(1, 400, 60).tolist()
    ]
    scores = rng.standard_exponential(sum(g.size for g in groups))
    check(scores.astype(np.float32), groups)
