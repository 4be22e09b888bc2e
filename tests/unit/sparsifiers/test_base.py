"""Properties of every sparsifier."""

import dataclasses
import math

import keras
import numpy as np
import pytest

import tf_regtopk

ALL = [
    tf_regtopk.TopK(0.25),
    tf_regtopk.RegTopK(0.25, mu=2.0, q=3.0, denominator="current"),
    tf_regtopk.RandomK(0.25, seed=7),
]


def test_defaults():
    assert dataclasses.asdict(tf_regtopk.RegTopK()) == {
        "density": None,
        "mu": 4.0,
        "q": 1e8,
        "denominator": "previous",
    }
    assert tf_regtopk.TopK().density is None
    assert dataclasses.asdict(tf_regtopk.RandomK()) == {
        "density": None,
        "seed": 0,
    }


@pytest.mark.parametrize("sparsifier", ALL)
def test_records_are_immutable_values(sparsifier):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparsifier.density = 0.5
    assert sparsifier == dataclasses.replace(sparsifier)
    assert hash(sparsifier) == hash(dataclasses.replace(sparsifier))
    assert sparsifier != dataclasses.replace(sparsifier, density=0.5)


@pytest.mark.parametrize("sparsifier", ALL)
def test_config_round_trip(sparsifier):
    config = keras.saving.serialize_keras_object(sparsifier)
    assert keras.saving.deserialize_keras_object(config) == sparsifier


def test_number_of_entries():
    assert tf_regtopk.TopK(0.001).num_selected(100) == 1
    assert tf_regtopk.TopK(0.01).num_selected(1049) == 10
    assert tf_regtopk.TopK(0.01).num_selected(1051) == 11
    assert tf_regtopk.TopK(1).num_selected(7) == 7
    # Without a density.
    k_of_size = {1: 1, 999: 999, 19_754: 1000, 999_000: 1000, 3_000_400: 3000}
    for size, k in k_of_size.items():
        assert tf_regtopk.TopK().num_selected(size) == k
        assert tf_regtopk.TopK().density_of(size) == k / size
    for size in range(1, 50):
        for density in (1e-9, 0.3, 0.999999, 1.0):
            assert 1 <= tf_regtopk.TopK(density).num_selected(size) <= size


@pytest.mark.parametrize(
    "make", [tf_regtopk.TopK, tf_regtopk.RegTopK, tf_regtopk.RandomK]
)
@pytest.mark.parametrize(
    "density", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.1"]
)
def test_bad_density(make, density):
    with pytest.raises(
        (ValueError, TypeError),
        match=r"`density` must be in \(0, 1\]. Received: density=",
    ):
        make(density=density)


def test_numpy_numbers_are_numbers():
    assert tf_regtopk.TopK(np.float32(0.5)).num_selected(10) == 5
    assert tf_regtopk.RandomK(seed=np.int64(3)).seed == 3
