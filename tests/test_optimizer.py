"""The wrapper under `fit` and in custom loops, with all kinds of models."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

INNER_OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


def small_data(size=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, 6)).astype(np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True)) + 0.1 * x[:, :1]
    return x, y.astype(np.float32)


def build_mlp(dtype=None):
    return keras.Sequential(
        [
            keras.layers.Dense(5, activation="tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


def fit(strategy, optimizer_fn, build_fn=build_mlp, data=None, **arguments):
    """Compiles and fits a model, built lazily; returns it."""
    x, y = data or small_data()
    for_compile = {
        name: arguments.pop(name)
        for name in ("run_eagerly", "jit_compile", "steps_per_execution")
        if name in arguments
    }
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = build_fn()
        model.compile(
            optimizer=optimizer_fn(), loss="mse", metrics=["mae"], **for_compile
        )
    arguments = {"epochs": 1, "batch_size": 12, **arguments}
    model.fit(x, y, shuffle=False, verbose=0, **arguments)
    return model


def residual_errors(optimizer):
    """One array for each replica."""
    return [
        arrays[0]
        for arrays in optimizer._partition.feedback_state.local_arrays()
    ]


def wrap(inner_fn, *args, **kwargs):
    return lambda: tf_regtopk.SparsifiedOptimizer(inner_fn(), *args, **kwargs)


def assert_replicas_equal(strategy, model):
    for variable in model.weights + model.optimizer.variables:
        # Metrics and seed states differ by design.
        values = strategy.experimental_local_results(variable.value)
        for value in values[1:]:
            np.testing.assert_array_equal(value.numpy(), values[0].numpy())


def assert_weights_close(model, other, **tolerances):
    for w, w_other in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(w, w_other, **tolerances)


def assert_weights_equal(model, other):
    for w, w_other in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(w, w_other)


def custom_loop_step(strategy, optimizer, variables, gradients_fn):
    def replica_step():
        replica = tf.distribute.get_replica_context()
        optimizer.apply(
            gradients_fn(replica.replica_id_in_sync_group), variables
        )

    strategy.run(replica_step)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_density_one_is_the_unwrapped_optimizer(inner, num_replicas, mirrored):
    """50 steps, each replica pulling the weights to a place of its own."""
    strategy = mirrored(num_replicas)
    inner_fn = INNER_OPTIMIZERS[inner]
    rng = np.random.default_rng(0)
    shapes = [(6, 5), (5,), ()]
    places = [
        tf.constant(rng.standard_normal((num_replicas, *shape)), "float32")
        for shape in shapes
    ]
    with strategy.scope():
        sides = [
            (optimizer, [keras.Variable(np.ones(s, "f4")) for s in shapes])
            for optimizer in (
                inner_fn(),
                tf_regtopk.SparsifiedOptimizer(
                    inner_fn(), tf_regtopk.RegTopK(1.0)
                ),
            )
        ]
        for optimizer, variables in sides:
            optimizer.build(variables)

    @tf.function
    def step():
        for optimizer, variables in sides:
            custom_loop_step(
                strategy,
                optimizer,
                variables,
                lambda n, variables=variables: [
                    (v.value - place[n]) / num_replicas
                    for v, place in zip(variables, places, strict=True)
                ],
            )

    for _ in range(50):
        step()
    (_, dense), (wrapped, sparsified) = sides
    assert wrapped.iterations.numpy() == 50
    for v, v_dense in zip(sparsified, dense, strict=True):
        np.testing.assert_allclose(v, v_dense, rtol=1e-5, atol=1e-6)
        assert np.any(v_dense.numpy() != 1.0)
        locals_ = strategy.experimental_local_results(v.value)
        for local in locals_:
            np.testing.assert_array_equal(local, locals_[0])


@pytest.mark.parametrize(
    "scope, run_eagerly", [("global", False), ("per_variable", True)]
)
def test_fit_with_validation_and_metrics(scope, run_eagerly, mirrored):
    strategy = mirrored(2)
    x, y = small_data(50)  # The last batch is a partial one.
    model = fit(
        strategy,
        wrap(
            INNER_OPTIMIZERS["momentum"], tf_regtopk.RegTopK(0.2), scope=scope
        ),
        data=(x, y),
        validation_data=(x, y),
        epochs=8,
        run_eagerly=run_eagerly,
    )
    losses = model.history.history["val_loss"]
    assert losses[-1] < 0.95 * losses[0]
    assert "val_mae" in model.history.history
    assert_replicas_equal(strategy, model)
    errors = residual_errors(model.optimizer)
    assert len(errors) == 2
    assert np.any(errors[0] != errors[1])


def test_graph_and_eager_agree(mirrored):
    models = [
        fit(
            mirrored(2),
            wrap(INNER_OPTIMIZERS["momentum"], tf_regtopk.RegTopK(0.2)),
            run_eagerly=run_eagerly,
        )
        for run_eagerly in (False, True)
    ]
    assert_weights_close(*models, rtol=1e-5, atol=1e-7)


def test_several_steps_per_execution(mirrored):
    """Keras's own all-reduce fails in this loop; the all-gather works."""
    models = [
        fit(
            mirrored(2),
            wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.RegTopK(0.2)),
            steps_per_execution=steps,
        )
        for steps in (1, 2)
    ]
    assert_weights_equal(*models)


@pytest.mark.slow
def test_two_runs_are_identical(mirrored):
    models = [
        fit(
            mirrored(3),
            wrap(INNER_OPTIMIZERS["adam"], tf_regtopk.RegTopK(0.1)),
            epochs=3,
        )
        for _ in range(2)
    ]
    assert_weights_equal(*models)


def test_random_k_in_fit(mirrored):
    strategy = mirrored(2)
    model = fit(
        strategy,
        wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.RandomK(0.1)),
        epochs=8,
    )
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]
    assert_replicas_equal(strategy, model)


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

    @tf.function
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
    dense = fit(strategy, INNER_OPTIMIZERS["adamw"], epochs=3)
    wrapped = fit(
        strategy,
        wrap(
            INNER_OPTIMIZERS["adamw"],
            tf_regtopk.TopK(0.01),
            dense_below=10**6,
        ),
        epochs=3,
    )
    assert_weights_equal(wrapped, dense)


def test_dense_below_leaves_small_variables_out(mirrored):
    """Only the 30-entry kernel is sparsified; 5-entry ones are exact."""
    strategy = mirrored(2)
    dense = fit(strategy, INNER_OPTIMIZERS["sgd"], steps_per_epoch=1)
    wrapped = fit(
        strategy,
        wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.1), dense_below=10),
        steps_per_epoch=1,
    )
    kernel, *small = wrapped.weights
    dense_kernel, *dense_small = dense.weights
    assert kernel.shape == (6, 5)
    for w, w_dense in zip(small, dense_small, strict=True):
        np.testing.assert_array_equal(w, w_dense)
    assert residual_errors(wrapped.optimizer)[0].shape == (30,)
    assert np.any(kernel.numpy() != dense_kernel.numpy())


def test_dense_below_takes_variables_with_fewer_entries():
    variables = [keras.Variable(np.zeros(n, "f4")) for n in (4, 5)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.2), dense_below=5
    )
    optimizer.apply([tf.ones(4), tf.ones(5)], variables)
    np.testing.assert_array_equal(variables[0], [-1.0] * 4)
    np.testing.assert_array_equal(variables[1], [-1.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("num_replicas", [0, 2])
def test_custom_loop_builds_lazily(num_replicas, in_graph, mirrored):
    strategy = mirrored(num_replicas)
    with strategy.scope():
        variables = [keras.Variable([1.0, 2.0, 3.0]), keras.Variable(4.0)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5)
        )

    def step():
        custom_loop_step(
            strategy,
            optimizer,
            variables,
            lambda n: [
                tf.constant([0.5, -2.0, 0.25]) * tf.cast(n + 1, tf.float32),
                tf.cast(n, tf.float32),
            ],
        )

    step = tf.function(step) if in_graph else step
    for _ in range(2):
        step()
    if num_replicas == 0:
        # Sent: (-2, .5), then (-2, .25 + .25) and .5 again tied: lower first.
        np.testing.assert_allclose(variables[0], [0.0, 6.0, 3.0])
        np.testing.assert_allclose(variables[1], 4.0)
    else:
        # Replica 0 sends -2 and .5 twice; replica 1 -4 and 1 (before the
        # equal scalar), then -4 and the scalar's 2 (before .5 + .5 and 1).
        np.testing.assert_allclose(variables[0], [-1.0, 14.0, 3.0])
        np.testing.assert_allclose(variables[1], 2.0)


def test_frozen_and_unused_variables(mirrored):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen = keras.layers.Dense(4, trainable=False)
            self.used = keras.layers.Dense(1)
            self.unused = keras.layers.Dense(2)

        def build(self, input_shape):
            for layer in (self.frozen, self.unused):
                layer.build(input_shape)
            self.used.build((None, 4))

        def call(self, x):
            return self.used(self.frozen(x))

    initial = fit(
        mirrored(2), lambda: keras.optimizers.SGD(0.0), Model
    ).get_weights()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        model = fit(
            mirrored(2),
            # Density 1: even the zeros of unused variables are selected.
            wrap(
                lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
                tf_regtopk.RegTopK(1.0),
            ),
            Model,
        )
    for layer, changes in (("frozen", 0), ("unused", 0), ("used", 1)):
        for w, w_initial in zip(model.weights, initial, strict=True):
            if layer == w.path.split("/")[-2]:
                assert np.any(w.numpy() != w_initial) == bool(changes)


def test_error_of_a_variable_without_gradient_is_kept():
    """Gradients that come and go, as when losses take turns."""
    variables = [keras.Variable(np.zeros(2, "f4")) for _ in range(2)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.25)
    )
    optimizer.apply(
        [tf.constant([5.0, 1.0]), tf.constant([3.0, 2.0])], variables
    )
    # k = 1.  [5] was sent; [3, 2] is held, and stays while None comes in.
    for _ in range(2):
        optimizer.apply([tf.constant([0.0, 0.25]), None], variables)
    np.testing.assert_array_equal(variables[1], [0.0, 0.0])
    np.testing.assert_array_equal(variables[0], [-5.0, -1.5])
    optimizer.apply([None, tf.constant([0.0, 0.0])], variables)
    np.testing.assert_array_equal(variables[1], [-3.0, 0.0])
    np.testing.assert_array_equal(
        residual_errors(optimizer)[0], [0.0, 0.0, 0.0, 2.0]
    )


def test_subset_and_order_of_variables():
    variables = [keras.Variable(np.zeros(n, "f4")) for n in (1, 2, 3)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(1.0)
    )
    optimizer.build(variables)
    optimizer.apply(
        [tf.constant([3.0, 3.0, 3.0]), tf.constant([1.0])],
        [variables[2], variables[0]],
    )
    for variable, value in zip(variables, (-1.0, 0.0, -3.0), strict=True):
        np.testing.assert_array_equal(variable, np.full(variable.shape, value))
    with pytest.raises(ValueError, match="unknown variable"):
        optimizer.apply([tf.constant(1.0)], [keras.Variable(1.0)])
    with pytest.raises(ValueError, match="must hold each variable once"):
        optimizer.apply([tf.ones(1), tf.ones(1)], [variables[0]] * 2)


@pytest.mark.parametrize("dense_below", [0, 1000])
def test_embeddings(dense_below, mirrored):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, (40, 3))
    y = (x.sum(axis=1, keepdims=True) / 150.0).astype(np.float32)

    def build():
        return keras.Sequential(
            [
                keras.layers.Embedding(50, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )

    arguments = dict(build_fn=build, data=(x, y), epochs=3, batch_size=10)
    dense = fit(mirrored(2), INNER_OPTIMIZERS["sgd"], **arguments)
    wrapped = fit(
        mirrored(2),
        wrap(
            INNER_OPTIMIZERS["sgd"],
            tf_regtopk.RegTopK(1.0),
            dense_below=dense_below,
        ),
        **arguments,
    )
    assert_weights_close(wrapped, dense, rtol=1e-5, atol=1e-6)


def test_several_dtypes_in_one_model(mirrored):
    strategy = mirrored(2)

    def build():
        return keras.Sequential(
            [
                keras.layers.Dense(4, dtype="bfloat16"),
                keras.layers.Dense(1, dtype="float32"),
            ]
        )

    model = fit(
        strategy,
        wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.RegTopK(0.3)),
        build,
        epochs=4,
    )
    assert model.weights[0].dtype == "bfloat16"
    assert residual_errors(model.optimizer)[0].dtype == np.float32
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]


def test_float64_keeps_its_precision(mirrored):
    keras.config.set_floatx("float64")
    x, y = (a.astype(np.float64) for a in small_data())
    arguments = dict(data=(x, y), epochs=2)
    dense = fit(mirrored(2), INNER_OPTIMIZERS["momentum"], **arguments)
    wrapped = fit(
        mirrored(2),
        wrap(INNER_OPTIMIZERS["momentum"], tf_regtopk.RegTopK(1.0)),
        **arguments,
    )
    assert wrapped.weights[0].dtype == "float64"
    assert_weights_close(wrapped, dense, rtol=1e-12, atol=1e-14)


def test_clipping_acts_on_the_aggregate(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable([0.0, 0.0])]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0, global_clipnorm=1.0),
            tf_regtopk.TopK(1.0),
        )
    # The sum is (30, 40): clipped, (0.6, 0.8).  Clipping each first would give
    # (1, 1).
    gradients = tf.constant([[30.0, 0.0], [0.0, 40.0]])
    custom_loop_step(strategy, optimizer, variables, lambda n: [gradients[n]])
    np.testing.assert_allclose(variables[0], [-0.6, -0.8], rtol=1e-6)


def test_average_schedule_and_decay_of_the_inner_optimizer(mirrored):
    def inner():
        return keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5),
            weight_decay=0.01,
            use_ema=True,
            ema_momentum=0.5,
        )

    dense = fit(mirrored(2), inner, epochs=3)
    wrapped = fit(mirrored(2), wrap(inner, tf_regtopk.TopK(1.0)), epochs=3)
    # `fit` ends with the averages in place of the weights.
    assert_weights_close(wrapped, dense, rtol=1e-5, atol=1e-6)


def test_weight_decay_exclusions_reach_the_inner_optimizer():
    variable = keras.Variable(np.ones(2, "f4"), name="bias")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, weight_decay=0.5), tf_regtopk.TopK(1.0)
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.apply([tf.zeros(2)], [variable])
    np.testing.assert_array_equal(variable, [1.0, 1.0])


def test_loss_scale_factor_of_the_inner_optimizer(mirrored):
    def inner(factor):
        return lambda: keras.optimizers.SGD(0.1, loss_scale_factor=factor)

    plain = fit(mirrored(0), wrap(inner(None), tf_regtopk.TopK(0.3)))
    scaled = fit(mirrored(0), wrap(inner(1024.0), tf_regtopk.TopK(0.3)))
    assert_weights_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_loss_scale_factor_yields_to_the_loss_scale_optimizer():
    """Keras turns the factor off on what it wraps, and so on the inner one."""
    inner = keras.optimizers.SGD(1.0, loss_scale_factor=8.0)
    wrapped = tf_regtopk.SparsifiedOptimizer(inner, tf_regtopk.TopK(1.0))
    assert wrapped.loss_scale_factor == 8.0
    optimizer = keras.optimizers.LossScaleOptimizer(wrapped, initial_scale=4.0)
    variable = keras.Variable([0.0])
    optimizer.apply([optimizer.scale_loss(tf.constant([1.0]))], [variable])
    np.testing.assert_array_equal(variable, [-1.0])


@pytest.mark.parametrize("in_graph", [False, True])
def test_loss_scale_optimizer_builds_lazily(in_graph, mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable([0.0, 0.0])]
        optimizer = tf_regtopk.LossScaleOptimizer(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5)
            ),
            initial_scale=2.0,
        )

    def step():
        custom_loop_step(
            strategy, optimizer, variables, lambda n: [tf.constant([4.0, 2.0])]
        )

    if in_graph:
        step = tf.function(step)
    step()
    np.testing.assert_array_equal(variables[0], [-4.0, 0.0])


def test_several_inner_optimizers(mirrored):
    """Keras's `MultiOptimizer` sums over the replicas in each of its parts."""
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable([0.0]), keras.Variable([0.0])]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(
                    keras.optimizers.SGD(1.0),
                    {variables[1].path: keras.optimizers.SGD(0.5)},
                )
            ),
            tf_regtopk.TopK(1.0),
        )
    custom_loop_step(
        strategy,
        optimizer,
        variables,
        lambda n: [tf.constant([1.0]), tf.constant([1.0])],
    )
    np.testing.assert_array_equal(variables[0], [-2.0])
    np.testing.assert_array_equal(variables[1], [-1.0])


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
    custom_loop_step(
        strategy,
        optimizer,
        variables,
        lambda n: [tf.ones(v.shape, v.dtype) for v in variables],
    )
    np.testing.assert_array_equal(variables[0].numpy(), [-2.0, -2.0])
    np.testing.assert_array_equal(variables[1], [-2.0, -2.0, -2.0])


def test_building_again_keeps_the_state():
    variable = keras.Variable([0.0, 0.0])
    optimizer = wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.5))()
    optimizer.apply([tf.constant([2.0, 1.0])], [variable])
    optimizer.build([variable])
    np.testing.assert_array_equal(residual_errors(optimizer)[0], [0.0, 1.0])


def test_set_weights():
    variable = keras.Variable([0.0, 0.0])
    optimizer = wrap(INNER_OPTIMIZERS["momentum"], tf_regtopk.TopK(1.0))()
    optimizer.build([variable])
    weights = [np.ones(v.shape) for v in optimizer.variables]
    optimizer.set_weights(weights)
    (momentum,) = optimizer.inner_optimizer.momentums
    np.testing.assert_array_equal(momentum, [1.0, 1.0])
    for v in optimizer.variables:
        np.testing.assert_array_equal(v, np.ones(v.shape))


def test_loss_scale_optimizer_around_the_wrapper():
    keras.config.set_dtype_policy("mixed_float16")
    model = fit(
        tf.distribute.get_strategy(),
        wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.3)),
        epochs=3,
    )
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]


def test_jit_compiled_model_without_a_strategy():
    models = [
        fit(
            tf.distribute.get_strategy(),
            wrap(INNER_OPTIMIZERS["momentum"], tf_regtopk.RegTopK(0.3)),
            jit_compile=jit_compile,
        )
        for jit_compile in (False, True)
    ]
    assert_weights_close(*models, rtol=1e-4, atol=1e-6)


def test_learning_rate_and_iterations_are_the_inner_ones(mirrored):
    strategy = mirrored(2)

    class Spy(keras.callbacks.Callback):
        seen = []

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append(self.model.optimizer.learning_rate.numpy())

    spy = Spy()
    model = fit(
        strategy,
        wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.3)),
        epochs=3,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2),
            spy,
        ],
    )
    np.testing.assert_allclose(spy.seen, [0.05, 0.025, 0.0125])
    inner = model.optimizer.inner_optimizer
    np.testing.assert_allclose(inner.learning_rate.numpy(), 0.0125)
    assert model.optimizer.iterations is inner.iterations
    assert inner.iterations.numpy() == 15


def test_no_retracing(mirrored):
    strategy = mirrored(2)
    model = fit(
        strategy, wrap(INNER_OPTIMIZERS["sgd"], tf_regtopk.RegTopK(0.3))
    )
    optimizer = model.optimizer
    send = optimizer._partition.sparse_step.send
    before = send.experimental_get_tracing_count()
    model.fit(*small_data(), batch_size=12, epochs=2, verbose=0)
    assert send.experimental_get_tracing_count() == before


def test_empty_gradients_are_no_step():
    optimizer = wrap(INNER_OPTIMIZERS["sgd"])()
    optimizer.apply([], [])
    assert int(optimizer.iterations) == 0


def test_all_none_is_the_error_of_keras():
    variables = [keras.Variable(1.0)]
    messages = []
    for make in (INNER_OPTIMIZERS["sgd"], wrap(INNER_OPTIMIZERS["sgd"])):
        with pytest.raises(ValueError) as error:
            make().apply([None], variables)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
