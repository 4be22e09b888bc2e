"""The optimizer with cross gradients: arguments, and what it reports."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

RING = tf_regtopk.Ring()
SIGN = tf_regtopk.Codec(values="sign")


def make(topology=RING, cross_gradients=None, **kwargs):
    return tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1),
        topology,
        cross_gradients=cross_gradients or tf_regtopk.CrossGradients(),
        **kwargs,
    )


def build(strategy, *args, **kwargs):
    with strategy.scope():
        variable = keras.Variable(np.ones(100), dtype="float32")
        optimizer = make(*args, **kwargs)
        optimizer.build([variable])
    return optimizer, variable


def test_config():
    optimizer = make(cross_gradients=tf_regtopk.CrossGradients(0.5, SIGN))
    config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(config)
    assert loaded.cross_gradients == tf_regtopk.CrossGradients(0.5, SIGN)
    assert loaded.get_config() == optimizer.get_config()
    plain = tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD(0.1))
    assert plain.cross_gradients is None
    # As of a file that knows nothing of them.
    config = plain.get_config()
    del config["cross_gradients"]
    assert type(plain).from_config(config).cross_gradients is None


@pytest.mark.filterwarnings("ignore:Replicas that send some")
@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            dict(sparsifier=tf_regtopk.TopK(0.1)),
            r"`sparsifier=Dense\(density=1.0\)`",
        ),
        (dict(codec=SIGN), r"`codec=Codec\(indices='auto', values='float32'"),
        (
            dict(error_feedback=tf_regtopk.Accumulate()),
            r"`error_feedback=NoFeedback\(\)`, because gradients are",
        ),
        (
            dict(mixing_rule=tf_regtopk.AverageTracker()),
            r"`mixing_rule=LinearGossip\(\)`",
        ),
        (
            dict(communication_period=2),
            "`communication_period=1`.*Received: {'communication_period': 2}",
        ),
        (
            dict(layer_mask=tf_regtopk.LayerMask([["dense"], []])),
            "`layer_mask=None`",
        ),
    ],
)
def test_the_exchange_must_be_exact(kwargs, message):
    with pytest.raises(ValueError, match="`cross_gradients` must go with"):
        make(**kwargs)
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_another_type_is_refused():
    with pytest.raises(TypeError, match="must be a `CrossGradients` such as"):
        make(cross_gradients=0.5)


def test_the_period_stays():
    optimizer = make()
    optimizer.communication_period = 1
    with pytest.raises(ValueError, match="`communication_period=1`"):
        optimizer.communication_period = 2


def test_topologies_that_do_not_suit(mirrored):
    cliques = tf_regtopk.Cliques([[0, 1], [2]], average_gradients=True)
    with pytest.raises(ValueError, match="`cross_gradients` must go with a t"):
        build(mirrored(3), cliques)
    directed = tf_regtopk.OnePeerExponential(directed=True)
    with pytest.raises(ValueError, match="because neighbours answer each oth"):
        build(mirrored(3), directed)
    build(mirrored(3), directed, tf_regtopk.CrossGradients(alpha=0))


@pytest.mark.parametrize(
    "n, topology, cross_gradients, sent",
    [
        # 100 entries of 4 bytes, a header of 8, and an answer without one.
        (3, RING, tf_regtopk.CrossGradients(), 2 * (408 + 400)),
        (3, RING, tf_regtopk.CrossGradients(alpha=0), 2 * 408),
        # Four words of signs, and one magnitude.
        (3, RING, tf_regtopk.CrossGradients(0.5, SIGN), 2 * (408 + 20)),
        (
            4,
            tf_regtopk.OnePeerExponential(),
            tf_regtopk.CrossGradients(),
            408 + 400,
        ),
    ],
)
def test_wire_report(n, topology, cross_gradients, sent, mirrored):
    optimizer, _ = build(mirrored(n), topology, cross_gradients)
    assert optimizer.wire_report().sent_bytes == sent


@pytest.mark.parametrize("n", [0, 3])
def test_the_loss_must_be_known(n, mirrored):
    """Also of a single replica, which has no neighbours."""
    strategy = mirrored(n)
    optimizer, variable = build(strategy)
    step = tf.function(
        lambda: strategy.run(
            lambda: optimizer.apply([tf.ones(100)], [variable])
        ),
        autograph=False,
    )
    with pytest.raises(
        ValueError, match=r"class Network\(tf_regtopk.CrossGradientTraining, "
    ):
        step()


def test_gradients_must_have_the_shapes_of_variables(mirrored):
    strategy = mirrored(3)
    optimizer, variable = build(strategy)

    def of_replica():
        with optimizer.with_gradients_at(lambda *_: [tf.ones(99)]):
            optimizer.apply([tf.ones(100)], [variable])

    with pytest.raises(ValueError, match="must have the shapes of their vari"):
        tf.function(lambda: strategy.run(of_replica), autograph=False)()


def test_cross_gradients_that_are_not_finite_count_as_zeros(mirrored):
    """And are counted; the neighbours are told zeros."""
    strategy = mirrored(3)
    optimizer, variable = build(strategy)

    def of_replica():
        replica = tf.distribute.get_replica_context()
        is_bad = tf.equal(replica.replica_id_in_sync_group, 1)

        def gradients_at(_, values):
            return [tf.where(is_bad, np.inf, values[0]) / 3]

        with optimizer.with_gradients_at(gradients_at):
            optimizer.apply([tf.ones(100) / 3], [variable])

    tf.function(lambda: strategy.run(of_replica), autograph=False)()
    assert optimizer.zeroed_gradients == [0, 2, 0]
    parts = strategy.experimental_local_results(variable.value)
    for rank, part in enumerate(parts):
        # One neighbour of the others has nothing to say.
        gradient = 1 if rank == 1 else 2 / 3
        np.testing.assert_allclose(part.numpy(), 1 - 0.1 * gradient, rtol=1e-6)


def test_nothing_is_known_after_a_step(mirrored):
    optimizer, variable = build(mirrored(0))
    with optimizer.with_gradients_at(lambda *_: [tf.zeros(100)]):
        optimizer.apply([tf.ones(100)], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.9)
    with pytest.raises(ValueError, match="must go with a model that knows"):
        optimizer.apply([tf.ones(100)], [variable])
