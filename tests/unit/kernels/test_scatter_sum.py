"""The sum of what several replicas sent."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import scatter_sum


@pytest.mark.parametrize("compiled", [False, True])
def test_sum_is_that_of_the_replicas_in_order(compiled):
    rng = np.random.default_rng(0)
    size, k, num_replicas = 37, 11, 5
    indices = np.stack(
        [rng.permutation(size)[:k] for _ in range(num_replicas)]
    ).astype(np.int32)
    values = rng.standard_normal((num_replicas, k)).astype(np.float32)
    expected = np.zeros(size, np.float32)
    for n in range(num_replicas):
        expected[indices[n]] += values[n]
    for kind in ("CPU", "GPU"):
        with device_kind.compile_for(kind):
            actual = tf.function(scatter_sum.sum_entries, jit_compile=compiled)(
                tf.constant(indices), tf.constant(values), size
            )
        np.testing.assert_array_equal(actual, expected)
