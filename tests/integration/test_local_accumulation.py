"""`accumulation_steps`: several batches exchanged as one larger batch."""

import warnings

import exchange_program
import flat_gradients
import keras
import numpy as np
import pytest
import reference
import small_models
import tensorflow as tf

import tf_regtopk

M = 4
WAYS = {
    "sparse": {},
    "dense_below": {"dense_below": 10},
    "dense": {"exchange": "dense"},
    "hierarchical": {"hierarchical": True},
    "per_variable": {"scope": "per_variable"},
    "auto": {"exchange": "auto"},
}


def gradients(num_replicas, num_exchanges=3):
    """`[exchanges, batches of each, replicas, J]`."""
    shape = (num_exchanges, M, num_replicas, exchange_program.SIZE)
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


class Run:
    """An optimizer that takes steps with gradients `[replicas, J]`."""

    def __init__(self, strategy, sparsifier=None, **kwargs):
        with strategy.scope():
            self.variables = [
                keras.Variable(np.zeros(shape, "f4"))
                for shape in exchange_program.SHAPES
            ]
            self.optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0),
                sparsifier or tf_regtopk.TopK(0.1),
                **kwargs,
            )
            self.optimizer.build(self.variables)
        self.trace(strategy)

    def trace(self, strategy):
        self.take_step = flat_gradients.step_function(
            strategy, self.optimizer, self.variables
        )

    def __call__(self, *g):
        for of_step in g:
            self.take_step(of_step)
        return self.weights

    @property
    def weights(self):
        return flat_gradients.flat_weights(self.variables)

    def total(self):
        """The sum of what the replicas of this process have accumulated."""
        accumulated = self.optimizer.save_state().accumulated
        return sum(
            np.concatenate([part.ravel() for part in parts])
            for devices in accumulated.values()
            for parts in devices
        )


@pytest.mark.parametrize(
    "num_replicas, way",
    [
        (2, "dense_below"),
        (2, "dense"),
        *(
            pytest.param(n, way, marks=pytest.mark.slow)
            for n in (0, 1, 2, 3)
            for way in WAYS
        ),
    ],
)
def test_as_one_larger_batch(num_replicas, way, mirrored):
    """At density 0.1, in a custom loop: the same entries of the same values."""
    strategy = mirrored(num_replicas)
    g = gradients(max(1, num_replicas))
    kwargs = WAYS[way]
    large = Run(strategy, **kwargs)
    run = Run(strategy, accumulation_steps=M, **kwargs)
    for number, of_exchange in enumerate(g):
        before = run.weights
        np.testing.assert_array_equal(run(*of_exchange[:-1]), before)
        assert run.optimizer.iterations.numpy() == number
        expected = large(of_exchange.mean(axis=0))
        actual = run(of_exchange[-1])
        np.testing.assert_array_equal(actual == 0, expected == 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
        assert run.optimizer.iterations.numpy() == number + 1


def test_against_the_reference(mirrored):
    g = gradients(2)
    run = Run(mirrored(2), tf_regtopk.RegTopK(0.1), accumulation_steps=M)
    workers = reference.Workers("regtopk", 2, [exchange_program.SIZE], 0.1)
    expected = np.zeros(exchange_program.SIZE)
    for of_exchange in g.astype(np.float64):
        # The reference's gradients are not divided by the replicas.
        expected -= workers.step(2 * of_exchange.mean(axis=0))
        actual = run(*of_exchange)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def fit(strategy, wrapped, batch_size, **kwargs):
    def inner():
        return keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
        )

    optimizer = inner
    if wrapped:
        optimizer = small_models.wrap(
            inner, tf_regtopk.TopK(1.0), accumulation_steps=M
        )
    return small_models.fit(
        strategy,
        optimizer,
        data=small_models.small_data(48),
        batch_size=batch_size,
        epochs=2,
        **kwargs,
    )


@pytest.mark.parametrize(
    "num_replicas, kwargs",
    [
        (2, {}),
        pytest.param(0, {"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(2, {"steps_per_execution": 3}, marks=pytest.mark.slow),
    ],
)
def test_fit_as_plain_keras_with_a_larger_batch(num_replicas, kwargs, mirrored):
    strategy = mirrored(num_replicas)
    plain = fit(strategy, wrapped=False, batch_size=24)
    model = fit(strategy, wrapped=True, batch_size=6, **kwargs)
    small_models.assert_weights_close(model, plain, rtol=1e-5, atol=1e-6)
    assert model.optimizer.iterations.numpy() == 4
    np.testing.assert_allclose(
        model.optimizer.learning_rate.numpy(),
        plain.optimizer.learning_rate.numpy(),
    )


def test_one_device_strategy():
    strategy = tf.distribute.OneDeviceStrategy("CPU:1")
    g = gradients(1, 1)
    run = Run(strategy, accumulation_steps=M, exchange="dense")
    expected = -g[0].mean(axis=0)[0]
    np.testing.assert_allclose(run(*g[0]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_not_finite_skips_the_exchange_that_it_belongs_to(way, mirrored):
    g = gradients(2)
    run = Run(mirrored(2), accumulation_steps=M, **WAYS[way])
    run(*g[0])
    weights, before = run.weights, str(run.optimizer.save_state())
    for number, (batch, replica, value) in enumerate(
        ((0, 1, np.nan), (M - 2, 0, np.inf), (M - 1, 1, -np.inf))
    ):
        bad = g[1].copy()
        bad[batch, replica, 3] = value
        bad[(batch + 1) % M, 1 - replica, 4] = np.nan  # Counted once.
        run(*bad)
        np.testing.assert_array_equal(run.weights, weights)
        assert run.optimizer.skipped_steps.numpy() == number + 1
        assert run.optimizer.iterations.numpy() == 1
        assert str(run.optimizer.save_state()) == before
    run(*g[1])  # Nothing of them is left.
    assert_nothing_is_lost(run, g[:2])


def assert_nothing_is_lost(run, g):
    """All gradients are in the weights, or in the residual errors."""
    kept = -run.weights
    if run.optimizer.chosen_exchange == "sparse":
        kept = kept + sum(
            np.concatenate([part.ravel() for part in parts])
            for parts in run.optimizer.residual_errors()
        )
    expected = g.mean(axis=1).sum(axis=(0, 1))
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_graph", [True, False])
def test_missing_and_sparse_gradients(in_graph):
    """Of an embedding, an unused variable, and others."""
    variables = [
        keras.Variable(np.zeros(shape, "f4")) for shape in ((5, 2), (3,), (4,))
    ]
    initial = keras.Variable(np.ones(3, "f4"))
    variables[1] = initial
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0, weight_decay=0.5),
        tf_regtopk.TopK(1.0),
        accumulation_steps=2,
    )

    def step(indices, values, dense):
        slices = tf.IndexedSlices(values, indices, tf.constant([5, 2]))
        optimizer.apply([slices, None, dense], variables)

    if in_graph:
        step = tf.function(
            step,
            input_signature=[
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([None, 2]),
                tf.TensorSpec([4]),
            ],
        )
    optimizer.build(variables)
    step(tf.constant([1, 1], tf.int64), tf.ones([2, 2]), tf.ones([4]))
    np.testing.assert_array_equal(variables[2], np.zeros(4))
    step(tf.constant([4], tf.int64), tf.ones([1, 2]), 3 * tf.ones([4]))
    embedding = np.zeros((5, 2))
    embedding[1], embedding[4] = -1, -0.5
    np.testing.assert_array_equal(variables[0], embedding)
    np.testing.assert_array_equal(variables[1], np.ones(3))  # No decay.
    np.testing.assert_array_equal(variables[2], np.full(4, -2.0))


def test_batches_of_one_exchange_have_the_same_gradients():
    variables = [keras.Variable(np.zeros(2, "f4")) for _ in range(2)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), exchange="dense", accumulation_steps=2
    )
    one = tf.ones([2])
    optimizer.apply([one, one], variables)
    with pytest.raises(tf.errors.InvalidArgumentError, match="same variables"):
        optimizer.apply([one, None], variables)
    optimizer.apply([one, one], variables)
    for _ in range(2):  # Another exchange may be of others.
        optimizer.apply([None, one], variables)
    np.testing.assert_array_equal(variables[0], [-1, -1])


def test_narrow_gradients_are_summed_in_float32():
    variable = keras.Variable(np.zeros(2), dtype="float16")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(1.0), accumulation_steps=3
    )
    for value in (6e4, 6e4, 6e4):  # Their sum is more than float16 holds.
        optimizer.apply([tf.constant([value, 1.0], "float16")], [variable])
    np.testing.assert_array_equal(variable, np.float16([-6e4, -1]))
    assert optimizer.skipped_steps.numpy() == 0


def test_the_density_changes_in_the_middle():
    strategy, g = tf.distribute.get_strategy(), gradients(1)
    run = Run(strategy, accumulation_steps=M)
    weights = run(*g[0], *g[1, :2])
    run.optimizer.set_density(0.5)
    # The function of before is refused in the exchange, and changes nothing.
    run(g[1, 2])
    before = str(run.optimizer.save_state())
    with pytest.raises(tf.errors.InvalidArgumentError, match="traced again"):
        run(g[1, 3])
    assert str(run.optimizer.save_state()) == before
    run.trace(strategy)
    num_changed = np.count_nonzero(run(g[1, 3]) - weights)
    assert num_changed == exchange_program.SIZE // 2
    assert_nothing_is_lost(run, g[:2])


# ----- Saving -----


def test_another_number_of_replicas_keeps_the_total(mirrored):
    g = gradients(2)[0]
    run = Run(mirrored(2), accumulation_steps=M)
    run(*g[:3])
    saved = run.optimizer.save_state()
    assert saved.moment["accumulated"] == [3, M]
    np.testing.assert_allclose(
        run.total(), g[:3].sum(axis=(0, 1)), rtol=1e-6, atol=1e-6
    )
    for num_replicas in (3, 0, 2):
        other = Run(mirrored(num_replicas), accumulation_steps=M)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "spread evenly".
            other.optimizer.load_state(saved)
        np.testing.assert_allclose(
            other.total(), run.total(), rtol=1e-6, atol=1e-6
        )
        of_devices = [*other.optimizer.save_state().accumulated.values()]
        assert len(of_devices) == max(1, num_replicas)
        if num_replicas == 2:
            assert str(other.optimizer.save_state()) == str(saved)


def test_hierarchical_devices_keep_their_own(mirrored):
    """All replicas of a process are one participant."""
    g = gradients(3, 2)
    kwargs = {
        "accumulation_steps": M,
        "hierarchical": True,
        "exchange": "dense",
    }
    run = Run(mirrored(3), **kwargs)
    run(*g[0], *g[1, :2])
    saved = run.optimizer.save_state()
    [devices] = saved.accumulated.values()
    assert len(devices) == 3
    again = Run(mirrored(3), **kwargs)
    again.optimizer.load_state(saved)
    np.testing.assert_equal(
        again.optimizer.save_state().accumulated, saved.accumulated
    )
    other = Run(mirrored(2), **kwargs)
    other.optimizer.load_state(saved)
    np.testing.assert_allclose(other.total(), run.total(), rtol=1e-6, atol=1e-6)


def compiled(strategy, accumulation_steps=M):
    return small_models.fit(
        strategy,
        small_models.wrap(
            small_models.INNER_OPTIMIZERS["momentum"],
            accumulation_steps=accumulation_steps,
            exchange="dense",  # Quicker to compile.
        ),
        data=small_models.small_data(42),
        batch_size=6,  # 7 batches: one exchange, and 3 batches of the next.
    )


def test_resumes_in_the_middle_to_the_bit(mirrored, tmp_path):
    strategy = mirrored(2)
    model = compiled(strategy)
    state = model.optimizer.save_state()
    assert state.moment["accumulated"] == [3, M]
    ways = {}
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "checkpoint")
    backup = tf_regtopk.Backup(tmp_path / "backup")
    assert backup.restore(model) == 0
    backup.set_model(model)
    backup.on_epoch_end(0)
    with strategy.scope():
        ways["keras"] = keras.saving.load_model(tmp_path / "m.keras")
    for way in ("weights", "checkpoint", "backup"):
        with strategy.scope():
            loaded = ways[way] = keras.models.clone_model(model)
            loaded.compile_from_config(model.get_compile_config())
            loaded.optimizer.build(loaded.trainable_variables)
            if way == "weights":
                loaded.load_weights(tmp_path / "m.weights.h5")
            elif way == "checkpoint":
                tf.train.Checkpoint(
                    model=loaded, optimizer=loaded.optimizer
                ).restore(path).assert_existing_objects_matched()
            else:
                backup = tf_regtopk.Backup(tmp_path / "backup")
                assert backup.restore(loaded) == 1
    x, y = small_models.small_data(12, seed=1)
    for loaded in (model, *ways.values()):
        assert str(loaded.optimizer.save_state().accumulated) == str(
            state.accumulated
        )
        assert loaded.optimizer.accumulation_steps == M
        loaded.fit(x, y, batch_size=6, shuffle=False, verbose=0)
        assert loaded.optimizer.iterations.numpy() == 2
        small_models.assert_weights_equal(loaded, model)


def test_files_of_other_numbers_of_batches(tmp_path):
    """Between exchanges a file is one of any number of batches."""
    strategy = tf.distribute.get_strategy()
    path = tmp_path / "m.weights.h5"
    middle, without = compiled(strategy), compiled(strategy, 1)
    without.save_weights(path)
    middle.load_weights(path)
    assert "accumulated" not in middle.optimizer.moment
    small_models.assert_weights_equal(middle, without)
    middle.save_weights(path)
    without.load_weights(path)
    middle.fit(*small_models.small_data(6), batch_size=6, verbose=0)
    middle.save_weights(path)
    with pytest.raises(ValueError, match="`accumulation_steps` must be 4"):
        without.load_weights(path)
    with pytest.raises(ValueError, match="Received: accumulation_steps=2"):
        compiled(strategy, 2).load_weights(path)


def test_without_it_nothing_is_added():
    optimizer = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())
    optimizer.build([keras.Variable(np.zeros(3, "f4"))])
    assert optimizer._accumulation is None
    assert "accumulation_steps" not in optimizer.get_config()
    assert "accumulated" not in optimizer.moment


# ----- With other optimizers -----


def test_an_accumulating_inner_optimizer_is_refused():
    def inner():
        return keras.optimizers.SGD(gradient_accumulation_steps=3)

    with pytest.raises(ValueError, match="pass `accumulation_steps=3` to"):
        tf_regtopk.SparsifiedOptimizer(inner())
    # But what version 0.1.0 has saved is loaded.
    config = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD()).get_config()
    config["inner_optimizer"] = keras.saving.serialize_keras_object(inner())
    loaded = tf_regtopk.SparsifiedOptimizer.from_config(config)
    assert loaded.inner_optimizer.gradient_accumulation_steps == 3
    variable = keras.Variable([0.0])
    for expected in (0.0, 0.0, -0.01):
        loaded.apply([tf.constant([1.0])], [variable])
        np.testing.assert_allclose(variable, [expected])


def test_a_jit_compiled_step_of_batches_that_do_not_fit_is_skipped():
    """XLA drops the check that raises an error elsewhere."""
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(1.0), accumulation_steps=3
    )
    optimizer.build(variables)

    def compiled(variable):
        return tf.function(
            lambda: optimizer.apply([tf.constant([3.0])], [variable]),
            jit_compile=True,
        )

    steps = [compiled(variable) for variable in variables]
    mixed = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    for num_skipped, batches in enumerate(mixed, 1):
        for i in batches:
            steps[i]()
        assert optimizer.skipped_steps.numpy() == num_skipped
        np.testing.assert_array_equal(variables, [[0.0], [0.0]])
    for _ in range(3):
        steps[0]()
    np.testing.assert_array_equal(variables, [[-3.0], [0.0]])
    assert optimizer.skipped_steps.numpy() == len(mixed)


def test_loss_scaling(mirrored):
    """An overflow of one batch on one replica halves the scale, once."""
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(np.zeros(4, "f4"))
        optimizer = tf_regtopk.LossScaleOptimizer(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0),
                tf_regtopk.TopK(1.0),
                accumulation_steps=2,
            ),
            initial_scale=8.0,
            dynamic_growth_steps=2,
        )
        optimizer.build([variable])
    take_step = flat_gradients.step_function(strategy, optimizer, [variable])
    g = np.full((2, 4), 4, np.float32)
    bad = g.copy()
    bad[1, 2] = np.inf
    scales = []
    for of_step in (bad, g, g, g, g, g):
        take_step(of_step)
        scales.append(float(optimizer.dynamic_scale.numpy()))
    assert scales == [8, 4, 4, 4, 4, 8]
    # Two exchanges of gradients that are those of the scale 4, of 2 replicas.
    np.testing.assert_array_equal(variable, np.full(4, -4.0))
    assert optimizer.inner_optimizer.skipped_steps.numpy() == 1


def test_a_loss_scale_grows_at_exchanges_only():
    """Batches could double it more often than exchanges halve it."""
    optimizer = tf_regtopk.LossScaleOptimizer(
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), accumulation_steps=M
        ),
        initial_scale=8.0,
        dynamic_growth_steps=1,
    )
    variable = keras.Variable([0.0])
    scales = []
    for value in [np.inf, 1.0, 1.0, 1.0] * 2 + [1.0] * 4:
        optimizer.apply([tf.constant([value])], [variable])
        scales.append(float(optimizer.dynamic_scale.numpy()))
    assert scales == [8.0] * 3 + [4.0] * 4 + [2.0] * 4 + [4.0]


def test_layers_are_frozen_in_the_middle():
    def make():
        variables = [keras.Variable([0.0]) for _ in range(2)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), accumulation_steps=2
        )
        optimizer.build(variables)
        return optimizer, variables

    optimizer, variables = make()
    one, none = tf.constant([1.0]), tf.zeros([1])
    optimizer.apply([one, one], variables)
    saved = optimizer.save_state()
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="call `optimizer.discard_accumul"
    ):
        optimizer.apply([one], variables[:1])
    optimizer.discard_accumulated()
    for _ in range(2):
        optimizer.apply([one], variables[:1])
    np.testing.assert_array_equal(variables, [[-1.0], [0.0]])

    # A state says nothing of which variables had a gradient.
    optimizer, variables = make()
    optimizer.load_state(saved)
    optimizer.apply([one], variables[:1])
    np.testing.assert_array_equal(variables, [[-1.0], [0.0]])
    for _ in range(2):
        optimizer.apply([none, none], variables)
    np.testing.assert_array_equal(variables, [[-1.0], [0.0]])


def test_discarding_where_nothing_is_accumulated():
    optimizer = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(1.0))
    with pytest.raises(ValueError, match="must be built"):
        optimizer.discard_accumulated()
    optimizer.build([keras.Variable([0.0])])
    optimizer.discard_accumulated()


def test_a_number_of_numpy_can_be_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), accumulation_steps=np.int64(2)
    )
    model.compile(optimizer, "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), 2, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.accumulation_steps == 2
    assert loaded.optimizer.save_state().accumulated


def test_what_is_no_summand_is_that_of_the_last_batch():
    variables = [keras.Variable(np.zeros(2, "f4")) for _ in range(2)]
    variables[1].overwrite_with_gradient = True
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(1.0), accumulation_steps=2
    )
    for value in (1.0, 3.0):
        optimizer.apply([tf.fill([2], value)] * 2, variables)
    np.testing.assert_array_equal(variables[0], [-2, -2])
    np.testing.assert_array_equal(variables[1], [3, 3])
