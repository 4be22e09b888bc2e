"""What the inner optimizer does, it does inside the wrapper."""

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk


@pytest.mark.parametrize(
    "inner, num_replicas",
    [
        (inner, n)
        if (inner, n)
        in (("sgd", 1), ("momentum", 2), ("adam", 4), ("adamw", 2))
        else pytest.param(inner, n, marks=pytest.mark.slow)
        for inner in small_models.INNER_OPTIMIZERS
        for n in (1, 2, 4)
    ],
)
def test_density_one_is_the_unwrapped_optimizer(inner, num_replicas, mirrored):
    """50 steps, each replica pulling the weights to a place of its own."""
    strategy = mirrored(num_replicas)
    inner_fn = small_models.INNER_OPTIMIZERS[inner]
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

    @tf.function(autograph=False)
    def step():
        for optimizer, variables in sides:
            small_models.custom_loop_step(
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
    small_models.custom_loop_step(
        strategy, optimizer, variables, lambda n: [gradients[n]]
    )
    np.testing.assert_allclose(variables[0], [-0.6, -0.8], rtol=1e-6)


def test_average_schedule_and_decay_of_the_inner_optimizer(mirrored):
    def inner():
        return keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5),
            weight_decay=0.01,
            use_ema=True,
            ema_momentum=0.5,
        )

    dense = small_models.fit(mirrored(2), inner, epochs=3)
    wrapped = small_models.fit(
        mirrored(2), small_models.wrap(inner, tf_regtopk.TopK(1.0)), epochs=3
    )
    # `fit` ends with the averages in place of the weights.
    small_models.assert_weights_close(wrapped, dense, rtol=1e-5, atol=1e-6)


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

    plain = small_models.fit(
        mirrored(0), small_models.wrap(inner(None), tf_regtopk.TopK(0.3))
    )
    scaled = small_models.fit(
        mirrored(0), small_models.wrap(inner(1024.0), tf_regtopk.TopK(0.3))
    )
    small_models.assert_weights_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_loss_scale_factor_yields_to_the_loss_scale_optimizer():
    """Keras turns the factor off on what it wraps, and so on the inner one."""
    inner = keras.optimizers.SGD(1.0, loss_scale_factor=8.0)
    wrapped = tf_regtopk.SparsifiedOptimizer(inner, tf_regtopk.TopK(1.0))
    assert wrapped.loss_scale_factor == 8.0
    optimizer = keras.optimizers.LossScaleOptimizer(wrapped, initial_scale=4.0)
    variable = keras.Variable([0.0])
    optimizer.apply([optimizer.scale_loss(tf.constant([1.0]))], [variable])
    np.testing.assert_array_equal(variable, [-1.0])


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
    small_models.custom_loop_step(
        strategy,
        optimizer,
        variables,
        lambda n: [tf.constant([1.0]), tf.constant([1.0])],
    )
    np.testing.assert_array_equal(variables[0], [-2.0])
    np.testing.assert_array_equal(variables[1], [-1.0])


def test_loss_scale_optimizer_around_the_wrapper():
    keras.config.set_dtype_policy("mixed_float16")
    model = small_models.fit(
        tf.distribute.get_strategy(),
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.3)
        ),
        epochs=3,
    )
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0]


def test_learning_rate_and_iterations_are_the_inner_ones(mirrored):
    strategy = mirrored(2)

    class Spy(keras.callbacks.Callback):
        seen = []

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append(self.model.optimizer.learning_rate.numpy())

    spy = Spy()
    model = small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["sgd"], tf_regtopk.TopK(0.3)
        ),
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
