"""Workers with weights of their own take the steps of as many replicas."""

import flat_gradients
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation

SIZE, RATE, NUM_STEPS = 23, 0.05, 7
CENTRES = np.random.default_rng(3).standard_normal((4, SIZE))
# Of a quadratic loss for each worker.
SLOPES = np.random.default_rng(4).uniform(0.5, 2.0, (4, SIZE))
START = np.random.default_rng(5).standard_normal(SIZE).astype("float32")
EIGHT_BITS = tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8))
PAIRS = tf_regtopk.Cliques([[0, 2], [1, 3]], average_gradients=True)


def simulated_weights(optimizer, n, measure_every=1):
    """Those of all workers after each step, `[NUM_STEPS, N, J]`."""
    run = simulation.gradient_descent(
        simulation.descent_of(optimizer, n),
        lambda w, data, t: data[1] * (w - data[0]),
        lambda w, data: w,
        NUM_STEPS,
        measure_every,
    )
    data = [a[:n].astype("float32") for a in (CENTRES, SLOPES)]
    return run(START, RATE, tuple(map(tf.constant, data))).numpy()


@pytest.mark.parametrize(
    "n, inner, kwargs",
    [
        (
            4,
            keras.optimizers.SGD(RATE, 0.9),
            dict(topology=tf_regtopk.Ring()),
        ),
        (
            4,
            keras.optimizers.SGD(RATE),
            dict(
                topology=tf_regtopk.Ring(),
                sparsifier=tf_regtopk.TopK(0.3),
                error_feedback=tf_regtopk.EF21(),
                consensus_step_size=0.4,
            ),
        ),
        (
            4,
            keras.optimizers.Adam(RATE),
            dict(codec=EIGHT_BITS, error_feedback=tf_regtopk.Accumulate()),
        ),
        (4, keras.optimizers.SGD(RATE, 0.5), dict(topology=PAIRS)),
        (
            4,
            keras.optimizers.SGD(RATE, 0.9),
            dict(
                topology=tf_regtopk.OnePeerExponential(directed=True),
                communication_period=2,
            ),
        ),
        (
            2,
            keras.optimizers.SGD(RATE),
            dict(
                topology=tf_regtopk.Complete(),
                mixing_rule=tf_regtopk.NonlinearGossip(),
                consensus_step_size=0.5,
            ),
        ),
    ],
    ids=["d-psgd", "choco", "deepsqueeze", "cliques", "period", "nonlinear"],
)
def test_takes_the_steps_of_the_optimizer(n, inner, kwargs, mirrored):
    strategy = mirrored(n)
    with strategy.scope():
        inner = inner.from_config(inner.get_config())
        optimizer = tf_regtopk.DecentralizedOptimizer(inner, **kwargs)
        variable = keras.Variable(START)
        optimizer.build([variable])
    simulated = simulated_weights(optimizer, n)
    step = flat_gradients.step_function(strategy, optimizer, [variable])

    def weights():
        parts = strategy.experimental_local_results(variable.value)
        return np.stack([part.numpy() for part in parts])

    for of_step in simulated:
        step(SLOPES[:n] * (weights() - CENTRES[:n]) / n)
        np.testing.assert_allclose(of_step, weights(), rtol=2e-5, atol=2e-6)
    assert simulated[-1].std(axis=0).max() > 1e-3
    descent = simulation.descent_of(optimizer, n)
    assert round(descent.sent_bytes(SIZE)) == optimizer.wire_report().sent_bytes


@pytest.mark.parametrize(
    "topology, cross_gradients",
    [
        (tf_regtopk.Ring(), tf_regtopk.CrossGradients(alpha=0.5)),
        (
            tf_regtopk.PeriodicGlobalAveraging(
                tf_regtopk.Cliques([[0, 3, 1], [2]]), 2
            ),
            tf_regtopk.CrossGradients(codec=tf_regtopk.Codec(values="sign")),
        ),
        (
            tf_regtopk.OnePeerExponential(directed=True),
            tf_regtopk.CrossGradients(alpha=0),
        ),
    ],
    ids=["ngc", "compngc", "weights"],
)
def test_takes_cross_gradients(topology, cross_gradients, mirrored):
    n, strategy = 4, mirrored(4)
    with strategy.scope():
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(RATE, 0.9),
            topology,
            cross_gradients=cross_gradients,
        )
        variable = keras.Variable(START)
        optimizer.build([variable])
    simulated = simulated_weights(optimizer, n)

    @tf.function(autograph=False)
    def step():
        def of_replica():
            replica = tf.distribute.get_replica_context()
            rank = replica.replica_id_in_sync_group
            slope, centre = (
                tf.gather(tf.constant(a, tf.float32), rank)
                for a in (SLOPES, CENTRES)
            )

            def gradients_at(_, values):
                return [slope * (values[0] - centre) / n]

            own = gradients_at(None, [tf.convert_to_tensor(variable)])
            with optimizer.with_gradients_at(gradients_at):
                optimizer.apply(own, [variable])

        strategy.run(of_replica)

    for of_step in simulated:
        step()
        parts = strategy.experimental_local_results(variable.value)
        np.testing.assert_allclose(
            of_step, [part.numpy() for part in parts], rtol=2e-5, atol=2e-6
        )
    assert simulated[-1].std(axis=0).max() > 1e-3
    descent = simulation.descent_of(optimizer, n)
    assert round(descent.sent_bytes(SIZE)) == optimizer.wire_report().sent_bytes


def ring(**kwargs):
    return tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(), tf_regtopk.Ring(), **kwargs
    )


def test_measures_after_some_steps():
    every = simulated_weights(ring(), 3)
    last = simulated_weights(ring(), 3, measure_every=NUM_STEPS)
    assert every.shape == (NUM_STEPS, 3, SIZE)
    assert last.shape == (1, 3, SIZE)
    np.testing.assert_allclose(last[-1], every[-1], rtol=1e-5)
    with pytest.raises(ValueError, match="must be a multiple of"):
        simulated_weights(ring(), 3, measure_every=2)


def test_a_gradient_that_is_not_finite_counts_as_zeros():
    descent = simulation.descent_of(ring(), 3)
    state = descent.initial_state(tf.zeros([2]))
    gradients = tf.constant([[1.0, 2.0], [np.nan, 1.0], [3.0, np.inf]])
    state = descent.step(state, gradients, tf.constant(0), tf.constant(0.5))
    np.testing.assert_array_equal(
        state.weights, [[-0.5, -1.0], [0.0, 0.0], [0.0, 0.0]]
    )


@pytest.mark.parametrize(
    "n, kwargs, message",
    [
        (1, {}, "`num_workers` must be an integer >= 2"),
        (
            2,
            dict(layer_mask=tf_regtopk.LayerMask([["dense"], []])),
            "`layer_mask` must be None in a simulation",
        ),
        (
            2,
            dict(mixing_rule=tf_regtopk.AverageTracker()),
            "`mixing_rule` must be one that changes the weights",
        ),
        (
            3,
            dict(
                topology=tf_regtopk.OnePeerExponential(directed=True),
                cross_gradients=tf_regtopk.CrossGradients(),
            ),
            "because neighbours answer each other",
        ),
        (
            4,
            dict(topology=PAIRS, cross_gradients=tf_regtopk.CrossGradients()),
            "`cross_gradients` must go with a topology that averages weights",
        ),
        (3, dict(topology=tf_regtopk.OnePeerExponential()), "a power of two"),
        (
            4,
            dict(
                topology=tf_regtopk.OnePeerExponential(),
                error_feedback=tf_regtopk.EF21(),
            ),
            "the same in all steps",
        ),
        (
            3,
            dict(
                topology=tf_regtopk.OnePeerExponential(directed=True),
                mixing_rule=tf_regtopk.NonlinearGossip(),
            ),
            "mixing matrices are symmetric",
        ),
    ],
)
def test_refusals(n, kwargs, message):
    optimizer = tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(), **kwargs
    )
    with pytest.raises(ValueError, match=message):
        simulation.descent_of(optimizer, n)
