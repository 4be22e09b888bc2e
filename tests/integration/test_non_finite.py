"""Gradients with NaN or infinity: all replicas skip the whole step."""

import warnings

import flat_gradients
import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk

SIZES = [7, 3]
SPARSIFIERS = [
    tf_regtopk.TopK(0.4),
    tf_regtopk.RegTopK(0.4),
    tf_regtopk.RandomK(0.4),
]


def make(strategy, sparsifier, around=lambda optimizer: optimizer, **kwargs):
    """An optimizer, its variables, and a function that takes a step."""
    with strategy.scope():
        variables = [keras.Variable(np.ones(n, "float32")) for n in SIZES]
        optimizer = around(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.Adam(0.1), sparsifier, **kwargs
            )
        )
        optimizer.build(variables)
    step = flat_gradients.step_function(strategy, optimizer, variables)

    def take_step(bad=None, scale=1.0):
        """`bad` is `(replica, variable, entry, value)` to plant."""
        gradients = [
            np.random.default_rng(replica).standard_normal(sum(SIZES))
            for replica in range(strategy.num_replicas_in_sync)
        ]
        gradients = np.array(gradients, "float32") * np.float32(scale)
        if bad:
            replica, variable, entry, value = bad
            gradients[replica][sum(SIZES[:variable]) + entry] = value
        step(gradients)

    return optimizer, variables, take_step


def wrapper_of(optimizer):
    if isinstance(optimizer, tf_regtopk.SparsifiedOptimizer):
        return optimizer
    return optimizer.inner_optimizer


def state_of(strategy, optimizer, variables):
    """All that a step may change, of every replica."""
    wrapper = wrapper_of(optimizer)
    return tf.nest.map_structure(
        np.array,
        [
            [strategy.experimental_local_results(v.value) for v in variables],
            [
                # Also the wrapper's own number of the step.
                v.numpy()
                for v in wrapper.variables
                if v is not wrapper.skipped_steps
            ],
            wrapper._partition.feedback_state.local_arrays(),
            wrapper._partition.memory.local_arrays(),
        ],
    )


def assert_same(actual, expected):
    tf.nest.map_structure(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "sparsifier, values",
    [
        *((sparsifier, "float32") for sparsifier in SPARSIFIERS),
        # Codecs that make infinity a finite value.
        (SPARSIFIERS[0], "float16"),
        (SPARSIFIERS[1], "bfloat16"),
        (SPARSIFIERS[1], "natural"),
        (SPARSIFIERS[0], "uniform"),
        (SPARSIFIERS[1], "sign"),
        (tf_regtopk.Dense(), "float16"),
    ],
)
def test_no_replica_takes_the_step(sparsifier, values, mirrored):
    strategy = mirrored(3)
    optimizer, variables, take_step = make(
        strategy, sparsifier, codec=tf_regtopk.Codec(values=values)
    )
    take_step()
    before = state_of(strategy, optimizer, variables)
    for bad in ((2, 0, 6, np.nan), (1, 1, 0, np.inf), (0, 0, 0, -np.inf)):
        take_step(bad)
    assert_same(state_of(strategy, optimizer, variables), before)
    assert optimizer.skipped_steps.numpy() == 3
    assert optimizer.iterations.numpy() == 1
    take_step()
    after = state_of(strategy, optimizer, variables)
    for replicas in after[0]:
        for replica in replicas:
            assert_same(replica, replicas[0])
        assert not np.array_equal(replicas[0], before[0][0][0])
    assert optimizer.iterations.numpy() == 2


def test_a_sum_that_overflows_is_no_number(mirrored):
    strategy = mirrored(2)
    optimizer, variables, take_step = make(strategy, tf_regtopk.TopK(0.4))
    before = state_of(strategy, optimizer, variables)
    take_step(scale=1.5e38)
    assert_same(state_of(strategy, optimizer, variables), before)
    assert optimizer.skipped_steps.numpy() == 1


@pytest.mark.parametrize("scope", ["global", "per_variable"])
def test_dense_variables_and_groups(scope, mirrored):
    """Variable 1 is exchanged densely: neither it nor the other one moves."""
    strategy = mirrored(2)
    optimizer, variables, take_step = make(
        strategy, tf_regtopk.RegTopK(0.4), scope=scope, dense_below=4
    )
    take_step()
    before = state_of(strategy, optimizer, variables)
    for bad_variable in (0, 1):
        take_step((1, bad_variable, 2, np.nan))
        assert_same(state_of(strategy, optimizer, variables), before)


def test_float64(mirrored):
    keras.config.set_floatx("float64")
    variable = keras.Variable(np.zeros(3), dtype="float64")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.RandomK(0.3)
    )
    # More than a float32 holds.
    optimizer.apply([tf.constant([1e300, 1e300, 1e300], "float64")], [variable])
    assert optimizer.skipped_steps.numpy() == 0
    optimizer.apply([tf.constant([0.0, np.nan, 0.0], "float64")], [variable])
    assert optimizer.skipped_steps.numpy() == 1


def test_a_sum_beyond_float16_is_clipped():
    """What replicas have saved up in float32 may be more than it holds."""
    variable = keras.Variable(np.zeros(2), dtype="float16")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1e-3), tf_regtopk.TopK(0.5)
    )
    for _ in range(3):
        optimizer.apply([tf.constant([6e4, 5e4], "float16")], [variable])
    assert np.isfinite(variable.numpy()).all() and variable.numpy().all()


def test_skipped_steps_outlive_saving(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.TopK(0.5)
        ),
        "mse",
    )
    model.fit(np.full((4, 2), np.nan), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.skipped_steps.numpy() == 1


# ----- Weights that are lost after the exchange -----


@keras.saving.register_keras_serializable(package="tests")
class DividesByZero(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(learning_rate * gradient / tf.abs(gradient))


@pytest.mark.parametrize("num_replicas, jit_compile", [(2, False), (0, True)])
def test_weights_lost_in_the_inner_update_are_said_once(
    num_replicas, jit_compile, mirrored
):
    with pytest.warns(UserWarning) as found:
        model = small_models.fit(
            mirrored(num_replicas),
            small_models.wrap(DividesByZero, tf_regtopk.TopK(0.2)),
            jit_compile=jit_compile,
        )
    # As plain Keras it goes on, for callbacks that look after the loss.
    assert np.isnan(model.history.history["loss"]).all()
    assert model.optimizer.skipped_steps.numpy() > 0
    [message] = [
        str(w.message) for w in found if "NaN or infinity" in str(w.message)
    ]
    assert "The weights of " in message and "kernel hold" in message
    assert "the update of DividesByZero made them so" in message


def test_steps_that_are_skipped_with_finite_weights_say_nothing():
    variable = keras.Variable([1.0, 1.0])
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), tf_regtopk.TopK(0.5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.finalize_variable_values([])  # It has no variables yet.
        optimizer.apply([tf.constant([np.nan, 0.0])], [variable])
        optimizer.finalize_variable_values([variable])


@pytest.mark.parametrize(
    "rule, exchange, gradients, name",
    [
        # Each sum of two is finite, and so is each change that is sent.
        (tf_regtopk.EF21(), "sparse", [1.0e38, 1.8e38], "Sum . of EF21"),
        (
            tf_regtopk.Accumulate(momentum=0.9),
            "dense",
            [1.0e38] * 3,
            "Sum . of Accumulate",
        ),
        # The optimizer's own momentum.
        (None, "dense", [1.0e38] * 3, "The weights of .*SGD made them so"),
    ],
)
def test_sums_that_overflow_over_the_steps_are_said(
    rule, exchange, gradients, name, mirrored
):
    """Such a step is taken: no replica looks through what it has summed up."""
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable([0.0, 0.0])
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0, momentum=0.0 if rule else 0.9),
            tf_regtopk.TopK(1.0),
            error_feedback=rule,
            exchange=exchange,
        )
        optimizer.build([variable])
    step = flat_gradients.step_function(strategy, optimizer, [variable])
    for gradient in gradients:
        step(np.full((2, 2), gradient))
    assert np.isinf(variable.numpy()).all()
    assert optimizer.skipped_steps.numpy() == 0
    with pytest.warns(UserWarning, match=name):
        step(np.full((2, 2), np.nan))


# ----- Loss scaling -----


def test_an_overflow_on_one_replica_halves_the_scale_once(mirrored):
    strategy = mirrored(2)
    optimizer, variables, take_step = make(
        strategy, tf_regtopk.RegTopK(0.4), tf_regtopk.LossScaleOptimizer
    )
    take_step(scale=2.0**15)
    assert optimizer.dynamic_scale.numpy() == 2.0**15
    before = state_of(strategy, optimizer, variables)
    for replica, scale in ((0, 2.0**14), (1, 2.0**13)):
        take_step((replica, 0, 1, np.inf))
        assert_same(state_of(strategy, optimizer, variables), before)
        for name, expected in (("dynamic_scale", scale), ("step_counter", 0)):
            values = strategy.experimental_local_results(
                getattr(optimizer, name).value
            )
            assert [v.numpy() for v in values] == [expected] * 2


def test_the_scale_follows_keras(mirrored):
    """Steps with and without overflow, against Keras's on one device."""
    strategy = mirrored(0)
    ours, theirs = (
        make(
            strategy,
            tf_regtopk.TopK(1.0),
            lambda optimizer, kind=kind: kind(
                optimizer, initial_scale=8.0, dynamic_growth_steps=3
            ),
        )
        for kind in (
            tf_regtopk.LossScaleOptimizer,
            keras.optimizers.LossScaleOptimizer,
        )
    )
    for step in range(12):
        bad = (0, 0, 0, np.inf) if step in (4, 5, 10) else None
        for *_, take_step in (ours, theirs):
            take_step(bad)
        (ours_opt, ours_vars, _), (theirs_opt, theirs_vars, _) = ours, theirs
        for name in ("dynamic_scale", "step_counter"):
            assert (
                getattr(ours_opt, name).numpy()
                == getattr(theirs_opt, name).numpy()
            ), (step, name)
        for a, b in zip(ours_vars, theirs_vars, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_scale_never_gets_stuck():
    optimizer, variables, _ = make(
        tf.distribute.get_strategy(),
        tf_regtopk.TopK(0.4),
        lambda o: tf_regtopk.LossScaleOptimizer(o, initial_scale=2.0**-126),
    )
    optimizer.apply([tf.fill(v.shape, np.nan) for v in variables], variables)
    assert optimizer.dynamic_scale.numpy() == np.float32(2.0**-126)


def test_keras_loss_scale_optimizer_under_a_strategy_is_refused(mirrored):
    strategy = mirrored(2)
    *_, take_step = make(
        strategy, tf_regtopk.TopK(0.4), keras.optimizers.LossScaleOptimizer
    )
    with pytest.raises(ValueError, match="must be scaled by"):
        take_step()


def test_only_this_wrapper_can_be_scaled():
    with pytest.raises(TypeError, match="must be a `SparsifiedOptimizer`"):
        tf_regtopk.LossScaleOptimizer(keras.optimizers.SGD())


def make_mixed(strategy, policy):
    """A net whose gradients overflow float16 while the scale is large."""
    keras.config.set_dtype_policy(policy)
    with strategy.scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1e-3, momentum=0.5), tf_regtopk.RegTopK(0.2)
        )
        if policy == "mixed_float16":
            optimizer = tf_regtopk.LossScaleOptimizer(optimizer)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(1, dtype="float32"),
            ]
        )
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
    assert model.optimizer is optimizer
    return model


def fit_mixed(model, strategy, seed, steps=60):
    """Trains for some steps, and returns the loss before and after."""
    rng = np.random.default_rng(seed)
    batch = 2 * strategy.num_replicas_in_sync
    x = rng.standard_normal((batch * steps, 6)).astype("float32") * 4
    y = x[:, :1] - x[:, 1:2] + 0.1 * rng.standard_normal((len(x), 1))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
    first = model.evaluate(dataset, verbose=0)
    model.fit(dataset, verbose=0)
    return first, model.evaluate(dataset, verbose=0)


@pytest.mark.parametrize(
    "num_replicas", [2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_mixed_float16_stays_finite(num_replicas, mirrored):
    strategy = mirrored(num_replicas)
    model = make_mixed(strategy, "mixed_float16")
    wrapper = model.optimizer.inner_optimizer
    initial = [v.numpy() for v in model.optimizer.variables]
    start = wrapper.save_state()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        model.set_weights(
            [rng.normal(0, 0.5, w.shape) for w in model.get_weights()]
        )
        for v, value in zip(model.optimizer.variables, initial, strict=True):
            v.assign(value)
        wrapper.load_state(start)
        first, last = fit_mixed(model, strategy, seed)
        for v in model.weights:
            values = strategy.experimental_local_results(v.value)
            for value in values:
                np.testing.assert_array_equal(value, values[0])
                assert np.isfinite(value).all()
        assert last < first
        assert wrapper.skipped_steps.numpy()  # Or this has tested nothing.


@pytest.mark.slow
def test_mixed_bfloat16(mirrored):
    model = make_mixed(mirrored(2), "mixed_bfloat16")
    first, last = fit_mixed(model, mirrored(2), 0)
    assert last < first
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.skipped_steps.numpy() == 0
