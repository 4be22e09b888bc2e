"""The wrapper under `fit`, with all kinds of models."""

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk


def assert_replicas_equal(strategy, model):
    for variable in model.weights + model.optimizer.variables:
        # Metrics and seed states differ by design.
        values = strategy.experimental_local_results(variable.value)
        for value in values[1:]:
            np.testing.assert_array_equal(value.numpy(), values[0].numpy())


@pytest.mark.parametrize(
    "scope, run_eagerly",
    [
        ("global", False),
        pytest.param("per_variable", True, marks=pytest.mark.slow),
    ],
)
def test_fit_with_validation_and_metrics(scope, run_eagerly, mirrored):
    strategy = mirrored(2)
    x, y = small_models.small_data(50)  # The last batch is a partial one.
    model = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["momentum"],
            tf_regtopk.RegTopK(0.2),
            scope=scope,
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
    errors = small_models.residual_errors(model.optimizer)
    assert len(errors) == 2
    assert np.any(errors[0] != errors[1])


def test_graph_and_eager_agree(mirrored):
    models = [
        small_models.fit(
            mirrored(2),
            small_models.wrap(
                small_models.INNER_OPTIMIZERS["momentum"],
                tf_regtopk.RegTopK(0.2),
            ),
            run_eagerly=run_eagerly,
        )
        for run_eagerly in (False, True)
    ]
    small_models.assert_weights_close(*models, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dense": ["bias"]}, {"topology": tf_regtopk.ReduceScatter()}],
    ids=str,
)
def test_several_steps_per_execution(arguments, mirrored):
    """Keras's own all-reduce fails in this loop; ours are counted."""
    models = [
        small_models.fit(
            mirrored(2),
            small_models.wrap(
                small_models.INNER_OPTIMIZERS["sgd"],
                tf_regtopk.RegTopK(0.2),
                **arguments,
            ),
            steps_per_execution=steps,
        )
        for steps in (1, 2)
    ]
    small_models.assert_weights_equal(*models)


@pytest.mark.slow
def test_two_runs_are_identical(mirrored):
    models = [
        small_models.fit(
            mirrored(3),
            small_models.wrap(
                small_models.INNER_OPTIMIZERS["adam"], tf_regtopk.RegTopK(0.1)
            ),
            epochs=3,
        )
        for _ in range(2)
    ]
    small_models.assert_weights_equal(*models)


def test_random_k_in_fit(mirrored):
    strategy = mirrored(2)
    model = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.RandomK(0.1)
        ),
        epochs=8,
    )
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]
    assert_replicas_equal(strategy, model)


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

    initial = small_models.fit(
        mirrored(2), lambda: keras.optimizers.SGD(0.0), Model
    ).get_weights()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        model = small_models.fit(
            mirrored(2),
            # Density 1: even the zeros of unused variables are selected.
            small_models.wrap(
                lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
                tf_regtopk.RegTopK(1.0),
            ),
            Model,
        )
    for layer, changes in (("frozen", 0), ("unused", 0), ("used", 1)):
        for w, w_initial in zip(model.weights, initial, strict=True):
            if layer == w.path.split("/")[-2]:
                assert np.any(w.numpy() != w_initial) == bool(changes)


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
    dense = small_models.fit(
        mirrored(2), small_models.INNER_OPTIMIZERS["sgd"], **arguments
    )
    wrapped = small_models.fit(
        mirrored(2),
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"],
            tf_regtopk.RegTopK(1.0),
            dense_below=dense_below,
        ),
        **arguments,
    )
    small_models.assert_weights_close(wrapped, dense, rtol=1e-5, atol=1e-6)


def test_several_dtypes_in_one_model(mirrored):
    strategy = mirrored(2)

    def build():
        return keras.Sequential(
            [
                keras.layers.Dense(4, dtype="bfloat16"),
                keras.layers.Dense(1, dtype="float32"),
            ]
        )

    model = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.RegTopK(0.3)
        ),
        build,
        epochs=4,
    )
    assert model.weights[0].dtype == "bfloat16"
    assert small_models.residual_errors(model.optimizer)[0].dtype == np.float32
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]


def test_float64_keeps_its_precision(mirrored):
    keras.config.set_floatx("float64")
    x, y = (a.astype(np.float64) for a in small_models.small_data())
    arguments = dict(data=(x, y), epochs=2)
    dense = small_models.fit(
        mirrored(2), small_models.INNER_OPTIMIZERS["momentum"], **arguments
    )
    wrapped = small_models.fit(
        mirrored(2),
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["momentum"], tf_regtopk.RegTopK(1.0)
        ),
        **arguments,
    )
    assert wrapped.weights[0].dtype == "float64"
    small_models.assert_weights_close(wrapped, dense, rtol=1e-12, atol=1e-14)


def test_jit_compiled_model_without_a_strategy():
    models = [
        small_models.fit(
            tf.distribute.get_strategy(),
            small_models.wrap(
                small_models.INNER_OPTIMIZERS["momentum"],
                tf_regtopk.RegTopK(0.3),
            ),
            jit_compile=jit_compile,
        )
        for jit_compile in (False, True)
    ]
    small_models.assert_weights_close(*models, rtol=1e-4, atol=1e-6)


def test_a_jit_compiled_function_skips_steps_of_another_density():
    """XLA drops the check that raises an error elsewhere."""
    variable = keras.Variable(np.zeros(10, "f4"))
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.1)
    )
    optimizer.build([variable])

    def compiled():
        return tf.function(
            lambda: optimizer.apply([tf.range(10.0)], [variable]),
            jit_compile=True,
        )

    step = compiled()
    step()
    optimizer.set_density(0.5)
    before = variable.numpy()
    assert np.count_nonzero(before) == 1
    step()
    np.testing.assert_array_equal(variable, before)
    assert optimizer.skipped_steps.numpy() == 1
    compiled()()
    assert np.count_nonzero(variable) == 5
    assert optimizer.skipped_steps.numpy() == 1


def test_steps_of_another_density_leave_the_loss_scale():
    variable = keras.Variable(np.zeros(10, "f4"))
    optimizer = tf_regtopk.LossScaleOptimizer(
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.1)
        ),
        initial_scale=8.0,
    )
    optimizer.build([variable])
    step = tf.function(
        lambda value: optimizer.apply([tf.fill([10], value)], [variable]),
        jit_compile=True,
    )
    step(tf.constant(1.0))
    optimizer.inner_optimizer.set_density(0.5)
    step(tf.constant(1.0))
    assert optimizer.inner_optimizer.skipped_steps.numpy() == 1
    assert optimizer.dynamic_scale.numpy() == 8.0
    assert optimizer.step_counter.numpy() == 1
    optimizer.inner_optimizer.set_density(0.1)
    # Nor do functions that are traced anew for another reason.
    step = tf.function(step.python_function, jit_compile=True)
    step(tf.constant(np.inf, tf.float32))
    assert optimizer.dynamic_scale.numpy() == 4.0


def test_no_retracing(mirrored):
    strategy = mirrored(2)
    model = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.RegTopK(0.3)
        ),
    )
    optimizer = model.optimizer
    send = optimizer._partition.sparse_step.send
    before = send.function.experimental_get_tracing_count()
    model.fit(*small_models.small_data(), batch_size=12, epochs=2, verbose=0)
    assert send.function.experimental_get_tracing_count() == before
