"""Bounds from a sample: they never change what is selected."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import selection_check
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.kernels import device_kind
from tf_regtopk.selection import largest
from tf_regtopk.selection import sampling

LARGE = 2**17 + 77  # Sampled, and no multiple of anything.


@pytest.mark.parametrize("mode", selection_check.MODES)
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
    scores = selection_check.draw_large_scores(data, LARGE)
    selection_check.check(
        scores, [selection.Group(LARGE, k)], selection_check.MODES[mode]
    )


def test_every_step_samples_anew_and_selects_the_same():
    rng = np.random.default_rng(0)
    groups = [selection.Group(LARGE, 1311)]
    compiled = tf.function(
        lambda scores, step: selection.select_largest(scores, groups, step),
        jit_compile=True,
        autograph=False,
    )
    for make in selection_check.LARGE_SCORES.values():
        scores = make(rng, LARGE).astype(np.float32)
        for step in range(3):
            np.testing.assert_array_equal(
                compiled(tf.constant(scores), tf.constant(step)),
                selection_check.expected(scores, groups),
            )


@pytest.mark.parametrize("chunk", [1000, LARGE // 3, LARGE - 1])
def test_all_scores_are_searched_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(largest, "_CHUNK", chunk)
    scores = selection_check.LARGE_SCORES["few_ties"](
        np.random.default_rng(0), LARGE
    )
    selection_check.check(
        scores.astype(np.float32),
        [selection.Group(LARGE, 40001)],
        selection_check.select,
    )


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
        make = selection_check.LARGE_SCORES[("layers", "every_96th")[step % 2]]
        scores = tf.constant(make(rng, LARGE).astype(np.float32))
        misses += not suffices(scores, tf.constant(step))
    assert misses <= 2
