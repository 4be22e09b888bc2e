"""The steps of an optimizer: its parts, and the options that are refused."""

import re

import keras
import pytest

import tf_regtopk
from tf_regtopk import simulation


def test_parts_of_an_optimizer():
    sparsifier = tf_regtopk.RandomK(0.4, seed=3)
    codec = tf_regtopk.Codec("golomb", "ternary")
    rule = tf_regtopk.EF21(momentum=0.5)
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.Adam(beta_1=0.5, beta_2=0.75, epsilon=0.25),
        sparsifier,
        codec=codec,
        error_feedback=rule,
    )
    inner = simulation.Adam(0.5, 0.75, 0.25)
    assert simulation.descent_of(optimizer, 5) == simulation.SparseDescent(
        sparsifier, rule, codec, 5, inner
    )
    assert simulation.descent_of(
        optimizer.inner_optimizer, 5
    ) == simulation.DenseDescent(inner)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "per_variable"},
        {"dense_below": 5},
        {"exchange": "dense"},
        {"topology": tf_regtopk.Hierarchical()},
        {"topology": tf_regtopk.ReduceScatter(hierarchical=True)},
    ],
)
def test_refuses_options_without_a_counterpart(options):
    [(name, value)] = options.items()
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), **options
    )
    with pytest.raises(
        ValueError,
        match=f"`{name}` must be .* in a simulation. Received: "
        + re.escape(f"{name}={value!r}"),
    ):
        simulation.descent_of(optimizer, 2)


@pytest.mark.parametrize(
    "inner, message",
    [
        (keras.optimizers.SGD(nesterov=True, momentum=0.5), "`nesterov` must"),
        (keras.optimizers.Adam(amsgrad=True), "`amsgrad` must be False"),
        (keras.optimizers.SGD(clipnorm=1.0), "`clipnorm` must be None"),
        (keras.optimizers.SGD(weight_decay=0.1), "`weight_decay` must be"),
        (keras.optimizers.Adam(use_ema=True), "`use_ema` must be False"),
    ],
)
def test_refuses_what_keras_adds(inner, message):
    for optimizer in (inner, tf_regtopk.SparsifiedOptimizer(inner)):
        with pytest.raises(ValueError, match=message):
            simulation.descent_of(optimizer, 2)


def test_refuses_other_optimizers():
    with pytest.raises(TypeError, match="must be `keras.optimizers.SGD`"):
        simulation.descent_of(keras.optimizers.AdamW(), 2)
    with pytest.raises(ValueError, match="`num_workers` must be an integer"):
        simulation.descent_of(keras.optimizers.SGD(), 0)
