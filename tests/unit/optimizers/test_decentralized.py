"""Arguments of the decentralised optimizer, and what it reports."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

RING = tf_regtopk.Ring()


def make(*args, **kwargs):
    return tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1), *args, **kwargs
    )


def test_config():
    optimizer = make(
        tf_regtopk.PeriodicGlobalAveraging(
            tf_regtopk.Cliques([[0, 1]], average_gradients=True), 4
        ),
        sparsifier=tf_regtopk.TopK(0.1),
        codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        error_feedback=tf_regtopk.Accumulate(),
        consensus_step_size=0.25,
        communication_period=3,
        average_at_end=False,
        name="mine",
    )
    config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(config)
    assert loaded.get_config() == optimizer.get_config()
    for name in (
        *("topology", "sparsifier", "codec", "error_feedback", "name"),
        *("consensus_step_size", "communication_period", "average_at_end"),
    ):
        assert getattr(loaded, name) == getattr(optimizer, name), name
    assert loaded.consensus_step_size == 0.25
    assert make().topology == tf_regtopk.OnePeerExponential()
    assert make().sparsifier == tf_regtopk.Dense()
    assert make().error_feedback == tf_regtopk.NoFeedback()


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(topology=tf_regtopk.AllGather()), TypeError, "`MixingTopology`"),
        (dict(topology="ring"), TypeError, "`topology` must be a `Mixing"),
        (dict(sparsifier=0), TypeError, "`sparsifier` must be a"),
        (dict(sparsifier=0.1), TypeError, "`sparsifier` must be a"),
        (dict(codec="int32"), TypeError, "`codec` must be a `Codec`"),
        (dict(error_feedback=1), TypeError, "`error_feedback` must be an"),
        (
            dict(error_feedback=tf_regtopk.Accumulate(momentum=0.9)),
            *(ValueError, "other rules are for gradients"),
        ),
        (
            dict(error_feedback=tf_regtopk.LearnedShift()),
            *(ValueError, "`EF21\\(\\)` or `Accumulate"),
        ),
        (
            dict(sparsifier=tf_regtopk.RegTopK(0.1)),
            *(ValueError, "remembers nothing"),
        ),
        (
            dict(codec=tf_regtopk.Codec("golomb")),
            *(ValueError, "in a fixed length"),
        ),
        (dict(consensus_step_size=0), ValueError, "in \\(0, 1\\]"),
        (dict(consensus_step_size=1.5), ValueError, "in \\(0, 1\\]"),
        (dict(communication_period=0), ValueError, "an integer >= 1"),
        (dict(average_at_end=1), TypeError, "`average_at_end` must be a bool"),
        (
            dict(accumulation_steps=2),
            *(ValueError, "must be `communication_period`"),
        ),
        (dict(weight_decay=0.1), ValueError, "on the `inner_optimizer`"),
        (dict(nonsense=1), TypeError, "Unknown argument `nonsense`"),
        (dict(density=1), TypeError, "It is one of the sparsifier, as in"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(use_ema=True), "must have no `use_ema`"),
        (dict(gradient_accumulation_steps=2), "as `communication_period` says"),
    ],
)
def test_bad_inner_optimizers(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD(0.1, **kwargs))


def test_compression_without_feedback_warns(recwarn):
    make(sparsifier=tf_regtopk.TopK(0.1), error_feedback=tf_regtopk.EF21())
    make()
    assert not recwarn
    for kwargs in (
        dict(sparsifier=tf_regtopk.TopK(0.1)),
        dict(codec=tf_regtopk.Codec(values="bfloat16")),
    ):
        with pytest.warns(UserWarning, match="they never agree"):
            make(**kwargs)


def build(strategy, *args, **kwargs):
    with strategy.scope():
        variables = [
            keras.Variable(np.ones(shape), dtype="float32")
            for shape in ((30, 3), (10,))
        ]
        optimizer = make(*args, **kwargs)
        optimizer.build(variables)
    return optimizer, variables


def test_ef21_needs_the_same_neighbours(mirrored):
    with pytest.raises(ValueError, match="2 different steps"):
        build(mirrored(4), error_feedback=tf_regtopk.EF21())
    # Of two replicas there is only one step.
    build(mirrored(2), error_feedback=tf_regtopk.EF21())


def test_a_topology_that_does_not_suit(mirrored):
    with pytest.raises(ValueError, match="a power of two.*3 replicas"):
        build(mirrored(3))


@pytest.mark.parametrize(
    "n, kwargs, sent",
    [
        # 100 entries of 4 bytes, and a header of 8.
        (4, dict(), 408),
        (3, dict(topology=RING), 2 * 408),
        (4, dict(topology=RING, communication_period=4), 2 * 408 / 4),
        (
            4,
            dict(
                topology=tf_regtopk.Cliques(
                    [[0, 1], [2, 3]], average_gradients=True
                )
            ),
            # Half of the replicas have a second neighbour.
            1.5 * 408 + 400,
        ),
        (
            4,
            dict(
                codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
                error_feedback=tf_regtopk.Accumulate(),
            ),
            # A byte an entry, and two numbers for the range.
            pytest.approx(108, abs=12),
        ),
    ],
)
def test_wire_report(n, kwargs, sent, mirrored):
    optimizer, _ = build(mirrored(n), **kwargs)
    assert optimizer.wire_report().sent_bytes == sent


def test_a_single_replica_sends_nothing(mirrored):
    optimizer, _ = build(mirrored(0))
    assert optimizer.replicas_agree
    with pytest.raises(ValueError, match="of several replicas"):
        optimizer.wire_report()


@pytest.mark.parametrize("by", ["keras", "package"])
def test_loss_scaling_is_refused(by, mirrored):
    classes = {
        "keras": keras.optimizers.LossScaleOptimizer,
        "package": tf_regtopk.LossScaleOptimizer,
    }
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(np.ones(2), dtype="float32")
        optimizer = classes[by](make())
        optimizer.build([variable])
    with pytest.raises(ValueError, match="go without a `LossScaleOptimizer`"):
        strategy.run(
            tf.function(
                lambda: optimizer.apply([tf.ones(2)], [variable]),
                autograph=False,
            )
        )


def test_other_optimizers_have_no_average():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with (
        pytest.raises(ValueError, match="with a `DecentralizedOptimizer`"),
        tf_regtopk.averaged(model),
    ):
        pass
    x, y = np.ones((4, 2)), np.ones(4)
    for callback in (
        tf_regtopk.ConsensusDistance(),
        tf_regtopk.EvaluateAverage(x, y),
    ):
        with pytest.raises(ValueError, match="with a `DecentralizedOptimizer`"):
            model.fit(x, y, callbacks=[callback], verbose=0)


@pytest.mark.parametrize(
    "callback", [tf_regtopk.Monitor(), tf_regtopk.DensityWarmup()]
)
def test_callbacks_for_gradients_are_refused(callback):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(make(), "mse")
    with pytest.raises(ValueError, match="must be a `SparsifiedOptimizer`"):
        model.fit(np.ones((4, 2)), np.ones(4), callbacks=[callback], verbose=0)
