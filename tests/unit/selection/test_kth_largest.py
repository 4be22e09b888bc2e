"""The k-th largest number, found by counting."""

import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk.selection import kth_largest


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("comparisons", [1, 1 << 15, 1 << 26])
@pytest.mark.parametrize("num_parts", [32, 50])
def test_kth_largest_by_counting(comparisons, num_parts, dtype, monkeypatch):
    """With narrow and wide digits; keys of all sizes, ties and padding."""
    monkeypatch.setattr(kth_largest, "_COMPARISONS", comparisons)
    # 300 keys are counted in one part, or in 50.
    monkeypatch.setattr(kth_largest, "_PARTS", num_parts)
    largest = np.iinfo(dtype).max
    rng = np.random.default_rng(0)
    keys = (largest * rng.random(300) ** 8).astype(dtype)
    keys[:40], keys[40:90], keys[90:100] = -1, 12345, largest
    ordered = np.sort(keys)[::-1]
    for k in (1, 9, 10, 11, 100, 200, 260):
        threshold, num_ties = kth_largest.kth_largest_by_counting(
            tf.constant(keys), tf.constant(k)
        )
        assert threshold == ordered[k - 1]
        assert num_ties == k - (keys > ordered[k - 1]).sum()
        bound, _ = kth_largest.kth_largest_by_counting(tf.constant(keys), k, 18)
        shift = 8 * np.dtype(dtype).itemsize - 1 - 18
        assert bound == ordered[k - 1] >> shift << shift
