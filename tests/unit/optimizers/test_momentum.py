"""Momentum of an inner optimizer, and of a rule of error feedback."""

import warnings

import keras
import pytest

import tf_regtopk
from tf_regtopk.optimizers import momentum

optimizers = keras.optimizers
NEEDS_PARTS = pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="Keras 3.15 has it."
)
RULES = [
    tf_regtopk.Accumulate(0.9),
    tf_regtopk.EF21(0.1),
    tf_regtopk.LearnedShift(momentum=0.9),
    tf_regtopk.CompressedDownlink(tf_regtopk.Accumulate(0.9)),
]


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: optimizers.SGD(), 0.0),
        (lambda: optimizers.SGD(momentum=0.8), 0.8),
        (lambda: optimizers.RMSprop(), 0.0),
        (lambda: optimizers.RMSprop(momentum=0.5), 0.5),
        (lambda: optimizers.Adagrad(), 0.0),
        (lambda: optimizers.Adafactor(), 0.0),
        (lambda: optimizers.Ftrl(), 0.0),
        *(
            (make, 0.9)
            for make in (
                optimizers.Adam,
                optimizers.AdamW,
                optimizers.Nadam,
                optimizers.Adamax,
                optimizers.Lamb,
                optimizers.Lion,
            )
        ),
        (lambda: optimizers.Adam(beta_1=0), 0.0),
        (lambda: optimizers.Muon(), 0.95),
        pytest.param(
            lambda: optimizers.MultiOptimizer(
                optimizers.OptimizerMap(
                    optimizers.SGD(), {"a": optimizers.SGD(momentum=0.6)}
                )
            ),
            0.6,
            marks=NEEDS_PARTS,
        ),
    ],
)
def test_momentum_of_an_optimizer(make, expected):
    assert momentum.momentum_of(make()) == expected


@pytest.mark.parametrize("rule", RULES)
def test_momentum_twice_is_said(rule):
    with pytest.warns(UserWarning, match="applied twice.* of 0.9") as found:
        tf_regtopk.SparsifiedOptimizer(
            optimizers.SGD(0.1, momentum=0.9), error_feedback=rule
        )
    assert found[0].filename == __file__  # It points at the user's line.


def test_momentum_once_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in RULES:
            tf_regtopk.SparsifiedOptimizer(
                optimizers.RMSprop(), error_feedback=rule
            )
        for rule in (
            tf_regtopk.Accumulate(),
            tf_regtopk.EF21(),
            tf_regtopk.LearnedShift(),
            tf_regtopk.NoFeedback(),
        ):
            tf_regtopk.SparsifiedOptimizer(
                optimizers.Adam(), error_feedback=rule
            )
