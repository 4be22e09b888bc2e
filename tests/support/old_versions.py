"""Marks of tests that the oldest supported versions cannot run, and why."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

needs_data_sets = pytest.mark.skipif(
    not hasattr(tfds, "testing"),
    reason="Before TensorFlow 2.20, needs tensorflow-metadata<1.18.",
)
needs_stablehlo = pytest.mark.skipif(
    tf.version.VERSION.startswith("2.18."),
    reason="TensorFlow writes StableHLO from 2.19 on.",
)
needs_typed_numpy = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.2.0",
    reason="`np.ndarray` alone is a whole type from NumPy 2.2 on.",
)
