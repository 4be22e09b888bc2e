"""The sum of what several replicas sent."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import scatter_sum


def entries(num_replicas, k, size):
    """Random entries of each replica, in no order."""
    rng = np.random.default_rng(0)
    indices = np.stack(
        [rng.permutation(size)[:k] for _ in range(num_replicas)]
    ).astype(np.int32)
    return indices, rng.standard_normal((num_replicas, k)).astype(np.float32)


@pytest.mark.parametrize("compiled", [False, True])
def test_sum_is_that_of_the_replicas_in_order(compiled):
    size, k, num_replicas = 37, 11, 5
    indices, values = entries(num_replicas, k, size)
    expected = np.zeros(size, np.float32)
    for n in range(num_replicas):
        expected[indices[n]] += values[n]
    for kind in ("CPU", "GPU"):
        with device_kind.compile_for(kind):
            actual = tf.function(scatter_sum.sum_entries, jit_compile=compiled)(
                tf.constant(indices), tf.constant(values), size
            )
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize(
    "k, size",
    [
        (20_000, 300_000),  # A run of 17,476 entries, and a shorter one.
        (40_000, 600_000),  # Two runs, and a shorter one.
        (1 << 15, 1 << 19),  # Two runs, and no rest.
    ],
)
def test_sum_by_several_runs(k, size, num_replicas):
    """All entries count; of one replica or two they have only one sum."""
    indices, values = entries(num_replicas, k, size)
    expected = np.zeros(size)
    for n in range(num_replicas):
        expected[indices[n]] += values[n]
    for kind in ("CPU", "GPU"):
        with device_kind.compile_for(kind):
            actual = scatter_sum.sum_entries(
                tf.constant(indices), tf.constant(values), size
            ).numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
        if num_replicas < 3:
            np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_sum_of_all_entries_reads_no_indices():
    values = np.random.default_rng(0).standard_normal((3, 7))
    actual = scatter_sum.sum_entries(
        tf.zeros([3, 0], tf.int32), tf.constant(values), 7
    )
    np.testing.assert_allclose(actual, values.sum(axis=0), rtol=1e-14)
