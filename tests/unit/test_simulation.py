"""Many workers in one program take the steps of as many replicas."""

import re

import flat_gradients
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation

SIZE = 7
RATE = 0.05
CENTRES = np.random.default_rng(3).standard_normal((3, SIZE))
# Of a quadratic loss for each worker.
SLOPES = np.random.default_rng(4).uniform(0.5, 2.0, (3, SIZE))


def weights_after_each_step(optimizer, num_workers, num_steps):
    """Of the simulation, `[num_steps, J]`, one entry of them at a time."""
    descent = simulation.descent_of(optimizer, num_workers)
    run = simulation.gradient_descent(
        descent,
        lambda w, data, t: data[1] * (w - data[0]),
        lambda w, data: tf.gather(w, data[2]),
        num_steps,
    )
    data = CENTRES[:num_workers], SLOPES[:num_workers]
    start = np.zeros(SIZE)
    return np.stack(
        [run(start, RATE, (*data, tf.constant(j))) for j in range(SIZE)], axis=1
    )


def gradients_at(w, num_workers):
    return SLOPES[:num_workers] * (w - CENTRES[:num_workers])


@pytest.mark.parametrize(
    "sparsifier, error_feedback, score, rule",
    [
        (
            tf_regtopk.TopK(0.4),
            tf_regtopk.NoFeedback(),
            "topk",
            reference.NoFeedback,
        ),
        (
            tf_regtopk.RegTopK(0.4),
            tf_regtopk.Accumulate(),
            "regtopk",
            reference.Accumulate,
        ),
        (tf_regtopk.TopK(0.4), tf_regtopk.EF21(), "topk", reference.EF21),
        (
            tf_regtopk.RegTopK(0.4),
            tf_regtopk.LearnedShift(),
            "regtopk",
            reference.LearnedShift,
        ),
    ],
)
def test_follows_the_reference(sparsifier, error_feedback, score, rule):
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), sparsifier, error_feedback=error_feedback
    )
    weights = weights_after_each_step(optimizer, 3, 30)
    workers = reference.Workers(score, 3, [SIZE], 0.4, feedback=rule())
    w = np.zeros(SIZE)
    for simulated in weights:
        w = w - RATE * workers.step(gradients_at(w, 3))
        np.testing.assert_allclose(simulated, w, rtol=1e-9)


@pytest.mark.parametrize(
    "topology",
    [None, tf_regtopk.AllGather(), tf_regtopk.ReduceScatter(keep=0.5)],
)
def test_takes_the_steps_of_the_optimizer(mirrored, topology):
    """With the same random rounding, and the inner optimizer's state."""
    keras.config.set_floatx("float64")
    strategy = mirrored(2)
    with strategy.scope():
        optimizer = keras.optimizers.Adam(RATE)
        if topology:
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer,
                tf_regtopk.RegTopK(0.4),
                codec=tf_regtopk.Codec(values="natural"),
                topology=topology,
            )
        variable = keras.Variable(np.zeros(SIZE))
        optimizer.build([variable])
    simulated = weights_after_each_step(optimizer, 2, 8)
    step = flat_gradients.step_function(strategy, optimizer, [variable])
    for weights in simulated:
        step(gradients_at(variable.numpy(), 2) / 2)
        # Keras rounds Adam's bias correction to float32.
        np.testing.assert_allclose(weights, variable.numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    "inner, optimizer",
    [
        (simulation.MomentumSGD(0.75), keras.optimizers.SGD(0.5, 0.75)),
        (simulation.Adam(), keras.optimizers.Adam(0.5)),
    ],
)
def test_inner_optimizers(inner, optimizer):
    variable = keras.Variable(np.zeros(6), dtype="float64")
    w, arrays = np.zeros(6), (tf.zeros(6, tf.float64),) * inner.num_arrays
    for t, g in enumerate(np.random.default_rng(0).standard_normal((5, 6))):
        rate = 0.5 / (t + 1)  # A momentum of SGD keeps the rates of before.
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(g)], [variable])
        change, arrays = inner(arrays, tf.constant(g), tf.constant(t), rate)
        w -= change
        np.testing.assert_allclose(variable.numpy(), w, rtol=1e-5)


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
