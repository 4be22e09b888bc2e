"""Options by variable, and whose gradient is clipped."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

SIZES = {"a": 10, "b": 6, "c": 8}


def make_variables():
    return [
        keras.Variable(np.zeros(size, "float32"), name=name)
        for name, size in SIZES.items()
    ]


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return [
        tf.constant(rng.standard_normal(size), tf.float32)
        for size in SIZES.values()
    ]


@pytest.mark.parametrize("scope", ["global", "per_variable"])
def test_variables_with_a_density_of_their_own(scope):
    variables = make_variables()
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0),
        tf_regtopk.TopK(0.25),
        scope=scope,
        densities={"b": 0.5, "a": 0.1},
        telemetry=True,
    )
    optimizer.apply(gradients(), variables)
    moved = [np.count_nonzero(v.numpy()) for v in variables]
    assert moved == [1, 3, 2]
    # In the order of the variables, though b and a lie last.
    [of_replica] = optimizer.telemetry()
    assert of_replica["selected_by_variable"].tolist() == moved
    [residual] = optimizer.residual_errors()
    for error, variable, g in zip(
        residual, variables, gradients(), strict=True
    ):
        np.testing.assert_array_equal(error, g.numpy() + variable.numpy())
    optimizer.set_density(0.75)
    assert optimizer.wire_report().num_selected == 1 + 3 + 6


def test_without_a_density_only_the_others_count():
    """The sparsifier's own default is of the entries that it is for."""
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), densities={"b": 0.5}
    )
    optimizer.build(make_variables())
    assert optimizer.density == 1
    assert optimizer.wire_report().num_selected == 10 + 3 + 8


def test_dense_variables_have_no_residual_error(mirrored):
    with mirrored(2).scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), dense=["a", "c"]
        )
        optimizer.build(make_variables())
    report = optimizer.wire_report()
    assert report.num_entries == 6
    assert report.dense_below_bytes == 4 * 18
    assert [len(errors) for errors in optimizer.residual_errors()] == [1, 1]


def train(strategy, make_optimizer, num_steps=2):
    """The variables after steps on gradients that differ by replica."""
    with strategy.scope():
        variables = make_variables()
        optimizer = make_optimizer()
        optimizer.build(variables)
    of_replicas = [gradients(seed) for seed in range(2)]

    @tf.function
    def step():
        def on_replica():
            n = tf.distribute.get_replica_context().replica_id_in_sync_group
            grads = [tf.gather(g, n) for g in zip(*of_replicas, strict=True)]
            # One replica is far louder.
            scale = tf.gather([1.0, 20.0], n)
            grads = [scale * g for g in grads]
            grads[1] = None  # No gradient, on either.
            optimizer.apply(grads, variables)

        strategy.run(on_replica)

    for _ in range(num_steps):
        step()
    return np.concatenate([v.numpy() for v in variables])


@pytest.mark.parametrize(
    "setting",
    [
        "global_clipnorm",
        pytest.param("clipnorm", marks=pytest.mark.slow),
        pytest.param("clipvalue", marks=pytest.mark.slow),
    ],
)
def test_clipping_on_each_replica_is_that_of_keras(mirrored, setting):
    strategy = mirrored(2)

    def sgd():
        return keras.optimizers.SGD(0.1, momentum=0.9, **{setting: 0.5})

    def wrapped(clipping):
        return lambda: tf_regtopk.SparsifiedOptimizer(
            sgd(), tf_regtopk.Dense(), clipping=clipping
        )

    plain = train(strategy, sgd)
    replica = train(strategy, wrapped("replica"))
    np.testing.assert_allclose(replica, plain, rtol=1e-6, atol=1e-7)
    aggregate = train(strategy, wrapped("aggregate"))
    assert np.abs(aggregate - plain).max() > 0.01


@pytest.mark.parametrize(
    "setting", ["clipvalue", "clipnorm", "global_clipnorm"]
)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_clipping_on_each_replica_hides_no_overflow(setting, number, is_sparse):
    variable = keras.Variable([[0.0], [0.0]])
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, **{setting: 1.0}),
        tf_regtopk.TopK(1.0),
        clipping="replica",
    )
    gradient = tf.constant([[number], [0.5]])
    if is_sparse:
        gradient = tf.IndexedSlices(
            gradient, tf.constant([0, 1]), tf.constant([2, 1])
        )
    optimizer.apply([gradient], [variable])
    assert optimizer.skipped_steps.numpy() == 1
    np.testing.assert_array_equal(variable, [[0.0], [0.0]])


def test_clipping_on_each_replica_leaves_values_to_overwrite_with():
    variables = [keras.Variable([0.0, 0.0]), keras.Variable([0.0])]
    variables[1].overwrite_with_gradient = True
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        tf_regtopk.TopK(1.0),
        clipping="replica",
    )
    optimizer.apply([tf.constant([3.0, 4.0]), tf.constant([100.0])], variables)
    np.testing.assert_allclose(variables[0], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_array_equal(variables[1], [100.0])


def test_clipping_of_parts_is_refused():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("This Keras has no MultiOptimizer.")
    inner = keras.optimizers.MultiOptimizer([(keras.optimizers.SGD(), None)])
    with pytest.raises(ValueError, match='`clipping="replica"` must go with'):
        tf_regtopk.SparsifiedOptimizer(inner, clipping="replica")


@keras.saving.register_keras_serializable(package="tests")
def is_small(variable):
    return variable.shape[0] < 8


@pytest.mark.parametrize("dense", [["a"], is_small])
def test_options_are_saved_with_the_optimizer(dense):
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(clipnorm=1.0),
        dense=dense,
        densities={"*c": 0.5},
        clipping="replica",
    )
    loaded = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert loaded.rules == optimizer.rules
    assert loaded.clipping == "replica"
