"""Random numbers that two parts would share."""

import warnings

import keras
import pytest

import tf_regtopk

SHARED = [
    (tf_regtopk.RandomK(0.5), tf_regtopk.Codec(values="natural")),
    (
        tf_regtopk.RandomK(0.5, seed=3),
        tf_regtopk.Codec(values=tf_regtopk.Uniform(seed=3)),
    ),
]
APART = [
    (tf_regtopk.RandomK(0.5, seed=1), tf_regtopk.Codec(values="natural")),
    (tf_regtopk.RandomK(0.5), tf_regtopk.Codec(values="sign")),
    (tf_regtopk.TopK(0.5), tf_regtopk.Codec(values="natural")),
]


@pytest.mark.parametrize("sparsifier, codec", SHARED)
def test_shared_numbers_are_said(sparsifier, codec):
    with pytest.warns(UserWarning, match="must have different seeds") as found:
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), sparsifier, codec=codec
        )
    assert found[0].filename == __file__  # It points at the user's line.
    with pytest.warns(UserWarning, match="must have different seeds") as found:
        tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(), sparsifier=sparsifier, codec=codec
        )
    assert found[0].filename == __file__


@pytest.mark.parametrize("sparsifier, codec", APART)
def test_numbers_of_their_own_say_nothing(sparsifier, codec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), sparsifier, codec=codec
        )
