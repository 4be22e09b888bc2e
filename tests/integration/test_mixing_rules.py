"""Rules of mixing under a strategy, against the equations of the papers."""

import decentralized_program
import flat_gradients
import gossip_reference
import keras
import numpy as np
import pytest
import small_models

import tf_regtopk

RING = tf_regtopk.Ring()


def step_all(strategy, optimizer, variables, twin, matrices):
    """Steps of both, with weights of each replica; yields after each one."""
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    for t, g in enumerate(decentralized_program.gradients()):
        take_step(g)
        n = len(twin.x)
        twin.step(matrices[t % len(matrices)], -0.1 * n * g[:n])
        yield decentralized_program.local_weights(strategy, variables)


def make(strategy, **kwargs):
    """An optimizer, its variables and their values, by plain SGD."""
    optimizer, variables = decentralized_program.make(
        strategy, momentum=0.0, **kwargs
    )
    weights = decentralized_program.local_weights(strategy, variables)
    return optimizer, variables, np.array(weights, float)


@pytest.mark.parametrize(
    "n, topology",
    [
        (2, RING),
        (3, RING),
        (4, tf_regtopk.OnePeerExponential()),
    ],
)
def test_nonlinear_gossip(n, topology, mirrored):
    rule = tf_regtopk.NonlinearGossip(alpha=0.6, epsilon=0.4)
    optimizer, variables, x = make(
        mirrored(n), topology=topology, mixing_rule=rule
    )
    twin = gossip_reference.NGO(x, rule.alpha, rule.epsilon)
    steps = step_all(
        mirrored(n), optimizer, variables, twin, topology.mixing_matrices(n)
    )
    for weights in steps:
        np.testing.assert_allclose(weights, twin.x, atol=2e-5)
    assert gossip_reference.disagreement(twin.x) > 0.05


@pytest.mark.parametrize(
    "n, topology, dtype",
    [
        (3, RING, "float32"),
        (2, RING, "float64"),
        (4, tf_regtopk.OnePeerExponential(directed=True), "float32"),
    ],
)
def test_tracked_average(n, topology, dtype, mirrored):
    strategy = mirrored(n)
    optimizer, variables, x = make(
        strategy,
        dtype=dtype,
        topology=topology,
        mixing_rule=tf_regtopk.AverageTracker(),
    )
    twin = gossip_reference.DACFL(x)
    steps = step_all(
        strategy, optimizer, variables, twin, topology.mixing_matrices(n)
    )
    for weights in steps:
        np.testing.assert_allclose(weights, twin.x, atol=2e-5)
    assert not optimizer.replicas_agree
    optimizer.use_tracked_average()
    z = np.array(decentralized_program.local_weights(strategy, variables))
    np.testing.assert_allclose(z, twin.tracker.z, atol=2e-5)
    np.testing.assert_allclose(z.sum(0), twin.x.sum(0), atol=1e-4)
    # Which the weights are not.
    assert np.abs(z - twin.x).max() > 0.05


def test_tracked_in_a_statement(mirrored):
    """Each replica has its own estimate, and gets its weights back."""
    strategy = mirrored(3)
    model = small_models.fit(
        strategy,
        lambda: tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.1),
            RING,
            mixing_rule=tf_regtopk.AverageTracker(),
            average_at_end=False,
            communication_period=2,
        ),
        data=small_models.small_data(48),
    )
    before, inside, after = [], [], []

    def note(weights):
        weights.extend(
            decentralized_program.local_weights(
                strategy, model.trainable_variables
            )
        )

    note(before)
    with tf_regtopk.tracked(model):
        note(inside)
        assert not model.optimizer.replicas_agree
    note(after)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(np.sum(inside, 0), np.sum(before, 0), atol=1e-4)
    assert np.abs(np.array(inside) - before).max() > 1e-3


def test_tracking_needs_its_rule(mirrored):
    optimizer, _, _ = make(mirrored(2), topology=RING)
    with pytest.raises(ValueError, match="must have `mixing_rule=Average"):
        optimizer.use_tracked_average()


@pytest.mark.parametrize(
    "kwargs, factor",
    [
        (dict(topology=RING), 2),
        (dict(topology=RING, communication_period=3), 2 / 3),
        (dict(topology=tf_regtopk.OnePeerExponential()), 1),
    ],
)
def test_tracking_doubles_the_bytes(kwargs, factor, mirrored):
    reports = [
        make(mirrored(4), mixing_rule=rule, **kwargs)[0].wire_report()
        for rule in (tf_regtopk.AverageTracker(), tf_regtopk.LinearGossip())
    ]
    tracking, plain = (report.sent_bytes for report in reports)
    size = decentralized_program.SIZE
    assert tracking - plain == pytest.approx(4 * size * factor, abs=1)
    assert tracking > 1.9 * plain
