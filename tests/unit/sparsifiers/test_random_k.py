"""RandomK: a fresh set of entries each step."""

import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import sparsifiers


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


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_bad_seed(seed):
    with pytest.raises(
        (ValueError, TypeError), match="`seed` must be an integer >= 0"
    ):
        tf_regtopk.RandomK(seed=seed)
