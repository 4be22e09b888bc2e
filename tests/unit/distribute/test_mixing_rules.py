"""Rules of mixing: invariants of the papers, and what they need."""

import gossip_reference
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.steps import average_tracking

RING = tf_regtopk.Ring()
RULES = [
    tf_regtopk.LinearGossip(),
    tf_regtopk.NonlinearGossip(alpha=0.5, epsilon=0.2),
    tf_regtopk.AverageTracker(),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_rule_is_the_same(rule):
    config = keras.saving.serialize_keras_object(rule)
    loaded = keras.saving.deserialize_keras_object(config)
    assert loaded == rule
    assert loaded is not rule


def distances(rule, num_steps, n=8):
    """Of a single number of each replica to the mean, in 64 bits."""
    x = np.random.default_rng(1).normal(size=n)
    rows = tf.constant(RING.mixing_matrices(n)[0] - np.eye(n))

    @tf.function(autograph=False)
    def step(x):
        values = x[:, tf.newaxis]
        d = [
            rule.disagreement(
                mixing_rules.Received(tf.zeros([n, 1]), values, rows[i]),
                values[i],
                1,
            )
            for i in range(n)
        ]
        return x + tf.concat(d, axis=0)

    found = []
    now = tf.constant(x)
    for _ in range(num_steps):
        now = step(now)
        found.append(np.linalg.norm(now - tf.reduce_mean(now)))
    assert np.mean(now) == pytest.approx(x.mean(), abs=1e-14)
    return found


def test_nonlinear_gossip_speeds_up():
    """Until it chatters: the log of the error falls ever more steeply."""
    linear, nonlinear, chattering = (
        distances(tf_regtopk.NonlinearGossip(alpha, epsilon=0.1), 600)
        for alpha in (1.0, 0.75, 0.5)
    )
    assert linear[199] == pytest.approx(1e-2, rel=0.3)
    assert linear[599] == pytest.approx(4e-6, rel=0.3)
    assert nonlinear[199] == pytest.approx(2.8e-5, rel=0.2)
    assert 3e-3 < chattering[599] < 1e-2

    def slope(found, first, last):
        return np.log(found[last] / found[first]) / (last - first)

    assert slope(nonlinear, 100, 150) < 1.5 * slope(nonlinear, 0, 50)
    assert slope(linear, 100, 150) > slope(linear, 0, 50)
    # All of it is plain gossip where alpha is 1.
    plain = distances(tf_regtopk.LinearGossip(), 20)
    whole = distances(tf_regtopk.NonlinearGossip(1.0, epsilon=1.0), 20)
    np.testing.assert_allclose(whole, plain, rtol=1e-9)


def tracked_ramp(mixing, num_steps=60):
    """The numbers of 8 nodes that grow steadily, and what follows their mean.

    Args:
        mixing: Function of (ahead, x) of all nodes that returns the next ahead.
        num_steps: Integer.
    """
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(8, 1)), rng.normal(size=(8, 1))
    ahead = np.zeros_like(x)
    found = []
    for _ in range(num_steps):
        ahead = mixing(ahead, x)
        x = x + slope
        found.append((x, ahead + x))
    return slope, found


@pytest.fixture
def track(monkeypatch):
    """A step of `AverageTracking` of 8 nodes in one process, in 64 bits."""
    differences = RING.mixing_matrices(8)[0] - np.eye(8)

    class Exchange:
        def __init__(self, steps, weights):
            np.testing.assert_allclose(weights[0], differences, atol=1e-6)
            assert len(steps) == 1

        def sum(self, vectors, number):
            return differences @ vectors

    monkeypatch.setattr(
        average_tracking.vector_exchange, "VectorExchange", Exchange
    )
    tracking = average_tracking.AverageTracking(RING, 8)
    return lambda ahead, x: tracking.next(ahead, x, 0)


def test_a_ramp_is_tracked_within_a_bound(track):
    """By |slope - mean| / (1 - rho); the sums stay equal."""
    slope, found = tracked_ramp(track)
    bound = np.linalg.norm(slope - slope.mean()) / RING.spectral_gap(8)
    errors = [np.abs(z - x.mean()).max() for x, z in found]
    assert all(error <= bound for error in errors)
    assert errors[-1] == pytest.approx(errors[-20], rel=1e-3)
    for x, z in found:
        assert z.sum() == pytest.approx(x.sum(), abs=1e-10)
    # The numbers themselves run away from each other.
    x, _ = found[-1]
    assert np.abs(x - x.mean()).max() > 5 * bound


def test_the_tracker_is_that_of_the_paper(track):
    slope, found = tracked_ramp(track, 20)
    first = found[0][0] - slope
    expected = gossip_reference.FODAC(first)
    [w] = RING.mixing_matrices(8)
    for x, z in found:
        expected.step(w, x)
        np.testing.assert_allclose(z, expected.z, atol=1e-12)


def make(mixing_rule, **kwargs):
    kwargs = {"topology": RING, **kwargs}
    return tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1), mixing_rule=mixing_rule, **kwargs
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_optimizer_saves_its_rule(rule):
    config = keras.optimizers.serialize(make(rule))
    assert keras.optimizers.deserialize(config).mixing_rule == rule
    assert make(None).mixing_rule == tf_regtopk.LinearGossip()


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(
            sparsifier=tf_regtopk.TopK(0.5),
            error_feedback=tf_regtopk.Accumulate(),
        ),
        dict(
            codec=tf_regtopk.Codec(values="bfloat16"),
            error_feedback=tf_regtopk.Accumulate(),
        ),
        dict(error_feedback=tf_regtopk.EF21()),
    ],
)
def test_nonlinear_gossip_needs_the_weights_themselves(kwargs):
    with pytest.raises(ValueError, match="must go with `Dense\\(\\)`, a codec"):
        make(tf_regtopk.NonlinearGossip(), **kwargs)
    make(tf_regtopk.AverageTracker(), **kwargs)


@pytest.mark.parametrize(
    "topology",
    [
        tf_regtopk.RingPass([[0, 1, 2]]),
        tf_regtopk.OnePeerExponential(directed=True),
    ],
)
def test_nonlinear_gossip_needs_symmetric_matrices(topology, mirrored):
    with mirrored(3).scope():
        variable = keras.Variable(np.ones(2), dtype="float32")
        with pytest.raises(ValueError, match="matrices are symmetric"):
            make(tf_regtopk.NonlinearGossip(), topology=topology).build(
                [variable]
            )
        make(tf_regtopk.AverageTracker(), topology=topology).build([variable])


def test_bad_arguments():
    with pytest.raises(ValueError, match="`alpha` must be in \\(0, 1\\]"):
        tf_regtopk.NonlinearGossip(alpha=0)
    with pytest.raises(ValueError, match="`epsilon` must be in \\(0, 1\\]"):
        tf_regtopk.NonlinearGossip(epsilon=2)
    with pytest.raises(TypeError, match="`mixing_rule` must be a `MixingRule`"):
        make("linear")
    assert tf_regtopk.NonlinearGossip(alpha=1).alpha == 1.0
