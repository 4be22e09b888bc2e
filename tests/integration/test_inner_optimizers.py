"""What the inner optimizer does, it does inside the wrapper."""

import gc
import itertools

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk

# Every optimizer of Keras, with its momentum where it has a choice.
EVERY_OPTIMIZER = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.05, 0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
}
if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
    EVERY_OPTIMIZER["schedulefree"] = lambda: (
        keras.optimizers.ScheduleFreeAdamW(0.01)
    )
HAS_MULTI_OPTIMIZER = hasattr(keras.optimizers, "MultiOptimizer")
# Those that say which of the others updates a variable, or scale the loss.
WITHOUT_UPDATE = {"LossScaleOptimizer", "MultiOptimizer", "Optimizer"}
# Keras's own fails there, wrapped or not: it reads a `path` that TensorFlow's
# variables do not have.
if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 13):
    del EVERY_OPTIMIZER["muon"]
    WITHOUT_UPDATE.add("Muon")


def test_the_list_has_every_optimizer_of_keras():
    found = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
    }
    listed = {type(make()).__name__ for make in EVERY_OPTIMIZER.values()}
    assert found - WITHOUT_UPDATE == listed


def run_every_optimizer(strategy, shapes, sides, num_steps):
    """Trains variables of each optimizer, each replica to a place of its own.

    A `MultiOptimizer` of all of them makes it one program, where Keras has it.

    Args:
        strategy: `tf.distribute.Strategy`.
        shapes: List of shapes; each optimizer has a variable of each.
        sides: List of `(wrap, order)`: a function of an optimizer, and the
            numbers of the places of the replicas.
        num_steps: Number of steps.

    Yields:
        After each step for each side a dict of arrays, by the name of the
        optimizer and the place of the shape.
    """
    count = strategy.num_replicas_in_sync
    rng = np.random.default_rng(0)
    places = {
        (name, i): tf.constant(rng.standard_normal((count, *shape)), "float32")
        for name in EVERY_OPTIMIZER
        for i, shape in enumerate(shapes)
    }
    names = [*EVERY_OPTIMIZER]
    groups = [names] if HAS_MULTI_OPTIMIZER else [[name] for name in names]
    made = []
    with strategy.scope():
        for (side, (wrap, order)), group in itertools.product(
            enumerate(sides), groups
        ):
            optimizer = wrap(make_one_of(group))
            variables = {
                (name, i): keras.Variable(
                    np.ones(shapes[i], "float32"), name=name
                )
                for name, i in places
                if name in group
            }
            optimizer.build([*variables.values()])
            made.append((side, optimizer, variables, tf.constant(order)))

    @tf.function(autograph=False)
    def step():
        for _, optimizer, variables, order in made:
            small_models.custom_loop_step(
                strategy,
                optimizer,
                [*variables.values()],
                lambda n, variables=variables, order=order: [
                    (v.value - tf.gather(places[key], order[n])) / count
                    for key, v in variables.items()
                ],
            )

    for _ in range(num_steps):
        step()
        weights = [{} for _ in sides]
        for side, _, variables, _ in made:
            weights[side].update(
                (key, v.numpy()) for key, v in variables.items()
            )
        yield weights


def make_one_of(names):
    """An optimizer, or one that applies each of several to its variables."""
    parts = {name: EVERY_OPTIMIZER[name]() for name in names}
    if len(parts) == 1:
        [part] = parts.values()
        return part
    return keras.optimizers.MultiOptimizer(lambda v: parts[v.path])


def wrapped(density):
    return lambda inner: tf_regtopk.SparsifiedOptimizer(
        inner, tf_regtopk.RegTopK(density)
    )


def test_every_optimizer_takes_gradients_of_zeros(mirrored):
    """Adafactor divides by zero where a row and a column are zeros."""
    *_, [weights] = run_every_optimizer(
        mirrored(0), [(6, 5)], [(wrapped(0.05), [0])], num_steps=20
    )
    for key, value in weights.items():
        assert np.isfinite(value).all() and np.any(value != 1.0), key


@pytest.mark.slow
def test_every_optimizer_does_what_it_does_unwrapped(mirrored):
    """To the bit, because the sum of two numbers has no order."""
    *_, (plain, dense, sparse) = run_every_optimizer(
        mirrored(2),
        [(6, 5), (2, 3, 4), (9, 4), (5,)],
        [
            (lambda inner: inner, [0, 1]),
            (wrapped(1.0), [0, 1]),
            (wrapped(0.01), [0, 1]),
        ],
        num_steps=20,
    )
    for key, value in plain.items():
        np.testing.assert_array_equal(dense[key], value, err_msg=key)
        assert np.isfinite(sparse[key]).all(), key


@pytest.mark.slow
def test_every_optimizer_at_density_one_is_within_the_order_of_the_sum(
    mirrored,
):
    """Of three replicas, which sums in another order tell from each other."""
    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    steps = [
        *run_every_optimizer(
            mirrored(3),
            [(6, 5), (2, 3, 4), (9, 4), (5,)],
            [*((lambda inner: inner, order) for order in orders)]
            + [(wrapped(1.0), orders[0])],
            num_steps=20,
        )
    ]
    for key in steps[0][0]:
        plain, *others, dense = (side[key] for side in steps[0])
        np.testing.assert_allclose(dense, plain, atol=1e-6, err_msg=key)
        plain, *others, dense = (side[key] for side in steps[-1])
        apart = max(np.abs(other - plain).max() for other in others)
        # Three orders are a sample of all the roundings that may occur.
        assert np.abs(dense - plain).max() <= 4 * apart + 1e-7, key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*EVERY_OPTIMIZER, *["multi"] * HAS_MULTI_OPTIMIZER]
)
def test_every_optimizer_trains_every_kind_of_layer(name, mirrored):
    def inner():
        if name != "multi":
            return EVERY_OPTIMIZER[name]()
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.05),
                {".*kernel": keras.optimizers.Adafactor(0.01)},
            )
        )

    def build():
        return keras.Sequential(
            [
                keras.Input([6], dtype="int32"),
                keras.layers.Embedding(40, 12),
                keras.layers.Conv1D(8, 3, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Flatten(),
                keras.layers.Dense(16, activation="relu"),
                keras.layers.LayerNormalization(),
                keras.layers.Dense(1),
            ]
        )

    x = np.random.default_rng(0).integers(0, 40, [64, 6])
    model = small_models.fit(
        mirrored(2),
        small_models.wrap(inner, tf_regtopk.RegTopK(0.01)),
        build,
        (x, np.sin(x.sum(axis=1, keepdims=True))),
        epochs=6,
        batch_size=16,
    )
    assert model.optimizer.skipped_steps.numpy() == 0
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    losses = model.history.history["loss"]
    if name != "momentum":  # Of the sum, it is too much here.
        assert losses[-1] < losses[0]


def test_adafactor_without_zero_rows_is_as_before():
    """Only where it would divide by zero does it do anything else."""
    gradient = np.random.default_rng(0).standard_normal((7, 4))
    variables = []
    for wrap in (lambda o: o, small_models.wrap):
        variable = keras.Variable(np.ones((7, 4), "float32"))
        optimizer = keras.optimizers.Adafactor(0.1)
        if wrap is small_models.wrap:
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer, tf_regtopk.Dense()
            )
        for scale in (1.0, 1e-8, 1e8):
            optimizer.apply(
                [tf.constant(scale * gradient, "float32")], [variable]
            )
        variables.append(variable.numpy())
    np.testing.assert_array_equal(*variables)


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


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize(
    "inner, kwargs",
    [
        (dict(clipnorm=1.0), dict(clipping="replica")),
        (dict(), dict(error_feedback=tf_regtopk.Accumulate(clip_norm=1.0))),
    ],
)
def test_loss_scale_factor_is_undone_before_clipping(
    n, inner, kwargs, mirrored
):
    def weights_of(factor):
        strategy = mirrored(n)
        with strategy.scope():
            variable = keras.Variable([0.0, 0.0])
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0, loss_scale_factor=factor, **inner),
                tf_regtopk.TopK(1.0),
                **kwargs,
            )
        for _ in range(2):
            small_models.custom_loop_step(
                strategy,
                optimizer,
                [variable],
                lambda n: [optimizer.scale_loss(tf.constant([3.0, 4.0]))],
            )
            assert optimizer.inner_optimizer.loss_scale_factor == factor
        return variable.numpy()

    np.testing.assert_allclose(weights_of(1024.0), weights_of(None), rtol=1e-6)


def test_loss_scale_factor_leaves_values_to_overwrite_with():
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    variables[1].overwrite_with_gradient = True
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, loss_scale_factor=8.0), tf_regtopk.TopK(1.0)
    )
    optimizer.apply([tf.constant([8.0]), tf.constant([8.0])], variables)
    np.testing.assert_array_equal(variables, [[-1.0], [8.0]])


def test_residual_errors_outlive_a_change_of_the_loss_scale_factor():
    variable = keras.Variable(np.zeros(4, "f4"))
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, loss_scale_factor=1024.0),
        tf_regtopk.TopK(0.25),
    )
    for factor in (1024.0, 1.0, 16.0):
        optimizer.loss_scale_factor = factor
        optimizer.apply(
            [optimizer.scale_loss(tf.constant([4.0, 3.0, 2.0, 1.0]))],
            [variable],
        )
    [[error]] = optimizer.residual_errors()
    np.testing.assert_array_equal(error - variable, [12.0, 9.0, 6.0, 3.0])


def test_errors_of_a_scaled_loss_saved_by_version_0_1_0():
    """That version kept them as they were before Keras divided."""
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, loss_scale_factor=8.0), tf_regtopk.TopK(0.5)
    )
    optimizer.build([keras.Variable([0.0, 0.0])])
    saved = optimizer.save_state()
    [[error]] = saved.replicas.values()
    old = saved._replace(shared=None, replicas={0: [error + 16.0]})
    for factor, expected in ((8.0, 2.0), (None, 16.0)):
        optimizer.loss_scale_factor = factor
        optimizer.load_state(old)
        np.testing.assert_array_equal(
            optimizer.residual_errors(), [[[expected] * 2]]
        )


def test_a_wrapper_that_is_forgotten_leaves_nothing_behind():
    inner = keras.optimizers.SGD(1.0, clipnorm=1.0)
    variable = keras.Variable([0.0])
    for number, clipping in enumerate(("replica", "aggregate"), 1):
        wrapped = tf_regtopk.SparsifiedOptimizer(
            inner, tf_regtopk.TopK(1.0), clipping=clipping
        )
        wrapped.build([variable])
        wrapped.apply([tf.constant([5.0])], [variable])
        np.testing.assert_allclose(variable, [-number])
        del wrapped
        gc.collect()


def test_exclusions_of_a_scaled_optimizer_are_those_of_the_inner_one():
    optimizer = tf_regtopk.LossScaleOptimizer(
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0, weight_decay=0.5), tf_regtopk.TopK(1.0)
        )
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    variables = [keras.Variable([1.0], name=name) for name in ("bias", "w")]
    optimizer.apply([tf.zeros([1])] * 2, variables)
    np.testing.assert_array_equal(variables, [[1.0], [0.5]])


def test_loss_scale_factor_yields_to_the_loss_scale_optimizer():
    """Keras turns the factor off on what it wraps, and so on the inner one."""
    inner = keras.optimizers.SGD(1.0, loss_scale_factor=8.0)
    wrapped = tf_regtopk.SparsifiedOptimizer(inner, tf_regtopk.TopK(1.0))
    assert wrapped.loss_scale_factor == 8.0
    optimizer = keras.optimizers.LossScaleOptimizer(wrapped, initial_scale=4.0)
    variable = keras.Variable([0.0])
    optimizer.apply([optimizer.scale_loss(tf.constant([1.0]))], [variable])
    np.testing.assert_array_equal(variable, [-1.0])


@pytest.mark.skipif(
    not HAS_MULTI_OPTIMIZER, reason="This Keras has no MultiOptimizer."
)
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
