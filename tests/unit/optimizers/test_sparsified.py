"""The wrapper's arguments, state and collectives."""

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk


@pytest.mark.parametrize("dense_below, reduces", [(0, 0), (10, 1)])
def test_one_all_gather_a_step(dense_below, reduces, mirrored):
    """Indices and values travel together, and nothing dense beside them."""
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable(np.ones(n, "f4")) for n in (20, 5, 30)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            tf_regtopk.RegTopK(0.1),
            dense_below=dense_below,
        )
        optimizer.build(variables)

    @tf.function(autograph=False)
    def step():
        def replica_step():
            optimizer.apply([tf.ones(v.shape) for v in variables], variables)

        strategy.run(replica_step)

    graph = step.get_concrete_function().graph
    collectives = [
        (op.type, op.device[-5:])
        for op in graph.get_operations()
        if op.type.startswith("Collective")
    ]
    expected = ["CollectiveGatherV2"] + ["CollectiveReduceV2"] * reduces
    assert sorted(collectives) == sorted(
        (kind, device[-5:])
        for kind in expected
        for device in strategy.extended.worker_devices
    )


def test_dense_below_is_what_the_inner_optimizer_would_have_seen(mirrored):
    strategy = mirrored(3)
    dense = small_models.fit(
        strategy, small_models.INNER_OPTIMIZERS["adamw"], epochs=3
    )
    wrapped = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["adamw"],
            tf_regtopk.TopK(0.01),
            dense_below=10**6,
        ),
        epochs=3,
    )
    small_models.assert_weights_equal(wrapped, dense)


def test_dense_below_leaves_small_variables_out(mirrored):
    """Only the 30-entry kernel is sparsified; 5-entry ones are exact."""
    strategy = mirrored(2)
    dense = small_models.fit(
        strategy, small_models.INNER_OPTIMIZERS["sgd"], steps_per_epoch=1
    )
    wrapped = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"],
            tf_regtopk.TopK(0.1),
            dense_below=10,
        ),
        steps_per_epoch=1,
    )
    kernel, *small = wrapped.weights
    dense_kernel, *dense_small = dense.weights
    assert kernel.shape == (6, 5)
    for w, w_dense in zip(small, dense_small, strict=True):
        np.testing.assert_array_equal(w, w_dense)
    assert small_models.residual_errors(wrapped.optimizer)[0].shape == (30,)
    assert np.any(kernel.numpy() != dense_kernel.numpy())


def test_dense_below_takes_variables_with_fewer_entries():
    variables = [keras.Variable(np.zeros(n, "f4")) for n in (4, 5)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.2), dense_below=5
    )
    optimizer.apply([tf.ones(4), tf.ones(5)], variables)
    np.testing.assert_array_equal(variables[0], [-1.0] * 4)
    np.testing.assert_array_equal(variables[1], [-1.0, 0.0, 0.0, 0.0, 0.0])


def test_dense_variables_of_several_dtypes(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(n), dtype=dtype)
            for n, dtype in ((2, "bfloat16"), (3, "float32"), (0, "float32"))
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), dense_below=10
        )
    small_models.custom_loop_step(
        strategy,
        optimizer,
        variables,
        lambda n: [tf.ones(v.shape, v.dtype) for v in variables],
    )
    np.testing.assert_array_equal(variables[0].numpy(), [-2.0, -2.0])
    np.testing.assert_array_equal(variables[1], [-2.0, -2.0, -2.0])


def test_building_again_keeps_the_state():
    variable = keras.Variable([0.0, 0.0])
    optimizer = small_models.wrap(
        small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.5)
    )()
    optimizer.apply([tf.constant([2.0, 1.0])], [variable])
    optimizer.build([variable])
    np.testing.assert_array_equal(
        small_models.residual_errors(optimizer)[0], [0.0, 1.0]
    )


def test_set_weights():
    variable = keras.Variable([0.0, 0.0])
    optimizer = small_models.wrap(
        small_models.INNER_OPTIMIZERS["momentum"], tf_regtopk.TopK(1.0)
    )()
    optimizer.build([variable])
    weights = [np.ones(v.shape) for v in optimizer.variables]
    optimizer.set_weights(weights)
    (momentum,) = optimizer.inner_optimizer.momentums
    np.testing.assert_array_equal(momentum, [1.0, 1.0])
    for v in optimizer.variables:
        np.testing.assert_array_equal(v, np.ones(v.shape))


@pytest.mark.parametrize(
    "argument, value",
    [
        ("sparsifier", tf_regtopk.TopK(0.1)),
        ("codec", tf_regtopk.Codec(values="sign")),
        ("error_feedback", tf_regtopk.EF21()),
        ("scope", "per_variable"),
        ("dense_below", 7),
        ("dense", ["*/bias"]),
        ("densities", {"*/kernel": 0.5}),
        ("clipping", "replica"),
        ("exchange", "dense"),
        ("topology", tf_regtopk.ReduceScatter()),
        ("accumulation_steps", 2),
        ("telemetry", True),
        ("inner_optimizer", keras.optimizers.SGD(0.2, clipvalue=1.0)),
    ],
)
def test_workers_compare_each_argument(argument, value):
    def facts(**kwargs):
        inner = keras.optimizers.SGD(0.1, clipvalue=1.0)
        return tf_regtopk.SparsifiedOptimizer(
            **{"inner_optimizer": inner, **kwargs}
        )._facts([])

    ours, others = facts(), facts(**{argument: value})
    assert [name for name in ours if ours[name] != others[name]] == [argument]
