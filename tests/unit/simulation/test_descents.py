"""Many workers in one program take the steps of as many replicas."""

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
    [
        None,
        pytest.param(tf_regtopk.AllGather(), marks=pytest.mark.slow),
        tf_regtopk.ReduceScatter(keep=0.5),
    ],
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
