"""A plain optimizer's training goes on with the wrapper, and back."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

RATE = 0.005
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
}


def make_model(strategy):
    with strategy.scope():
        return keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5, name="a"),
                keras.layers.BatchNormalization(name="b"),
                keras.layers.Dense(2, name="c"),
            ]
        )


def compile_model(model, strategy, wrapped, name="adam", built=True):
    with strategy.scope():
        optimizer = OPTIMIZERS[name]()
        if wrapped:
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer, tf_regtopk.RegTopK(0.25)
            )
        model.compile(
            optimizer, keras.losses.Huber(name="mine"), metrics=["mae"]
        )
        if built:
            model.optimizer.build(model.trainable_variables)
    return model


def inner(model):
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def kept(model):
    """What goes on: weights, slots, step count and learning rate."""
    return [v.numpy() for v in [*model.weights, *inner(model).variables]]


def errors(model):
    return np.array(
        [
            np.concatenate([np.ravel(part) for part in of_replica])
            for of_replica in model.optimizer.residual_errors()
        ]
    )


def pretend_to_train(model, seed=0):
    """Changes all that training changes, in less time."""
    rng = np.random.default_rng(seed)
    optimizer = inner(model)
    for v in [*model.weights, *optimizer.variables]:
        v.assign(rng.integers(1, 99, v.shape))
    optimizer.learning_rate = RATE
    if optimizer is not model.optimizer:
        model.optimizer.counters[0].assign(7)
        model.optimizer.counters[1].assign(3)
        state = model.optimizer.save_state()
        for arrays in state.replicas.values():
            arrays[0] = rng.standard_normal(arrays[0].shape).astype("f4")
        model.optimizer.load_state(state)


def assert_goes_on(model, before):
    for value, expected in zip(kept(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert model.optimizer.learning_rate.numpy() == np.float32(RATE)
    assert model.loss.name == "mine"


def assert_starts_without_errors(model):
    assert not np.any(errors(model))
    assert [int(c.numpy()) for c in model.optimizer.counters] == [0, 0]


# ----- Checkpoints -----


@pytest.mark.parametrize("moment", ["built", "compiled", "before compile"])
@pytest.mark.parametrize(
    "saved_wrapped, loaded_wrapped, num_replicas",
    [
        (False, True, 0),
        (True, False, 0),
        (True, True, 0),
        (False, True, 2),
        (True, False, 2),
        (True, True, 2),
    ],
)
def test_checkpoint(
    saved_wrapped, loaded_wrapped, num_replicas, moment, mirrored, tmp_path
):
    strategy = mirrored(num_replicas)
    model = compile_model(make_model(strategy), strategy, saved_wrapped)
    pretend_to_train(model)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    other = make_model(strategy)
    if moment != "before compile":
        compile_model(other, strategy, loaded_wrapped, built=moment == "built")
    if moment == "built":
        pretend_to_train(other, seed=1)
    status = tf.train.Checkpoint(model=other).restore(path)
    if moment == "built":
        status.assert_existing_objects_matched()
        if loaded_wrapped == saved_wrapped:
            status.assert_consumed()
    status.expect_partial()
    if moment == "before compile":
        compile_model(other, strategy, loaded_wrapped)
    with strategy.scope():
        other.optimizer.build(other.trainable_variables)
    assert_goes_on(other, kept(model))
    if saved_wrapped and loaded_wrapped:
        np.testing.assert_array_equal(errors(other), errors(model))
        counters = [int(c.numpy()) for c in other.optimizer.counters]
        assert counters == [7, 3]
    elif loaded_wrapped:
        assert_starts_without_errors(other)


def test_two_optimizers_of_one_checkpoint(tmp_path, caplog):
    """One of them was wrapped, and one was not."""

    def make(wrapped):
        variable = tf.Variable([1.0, 2.0])
        optimizer = OPTIMIZERS["momentum"]()
        if wrapped:
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer, tf_regtopk.TopK(0.5)
            )
        optimizer.build([variable])
        return optimizer, variable

    plain, _ = make(False)
    wrapped, variable = make(True)
    wrapped.apply([tf.constant([3.0, 4.0])], [variable])
    plain.variables[2].assign([5.0, 6.0])
    path = tf.train.Checkpoint(a=plain, b=wrapped).write(str(tmp_path / "c"))
    a, b = make(True)[0], make(True)[0]
    with caplog.at_level("WARNING", "tf_regtopk"):
        tf.train.Checkpoint(a=a, b=b).read(
            path
        ).assert_existing_objects_matched()
    [line] = [r.message for r in caplog.records if "start at zero" in r.message]
    assert f"'{a.name}'" in line
    np.testing.assert_array_equal(a.inner_optimizer.variables[2], [5, 6])
    np.testing.assert_array_equal(a.residual_errors(), [[[0, 0]]])
    np.testing.assert_array_equal(b.residual_errors(), [[[3, 0]]])


@pytest.mark.parametrize("saved_wrapped", [False, True])
def test_an_optimizer_as_the_root(saved_wrapped, tmp_path):
    def make(wrapped):
        optimizer = OPTIMIZERS["adam"]()
        if wrapped:
            optimizer = tf_regtopk.SparsifiedOptimizer(optimizer)
        optimizer.build([tf.Variable([1.0, 2.0])])
        return optimizer

    saved, restored = make(saved_wrapped), make(True)
    checkpoint = tf.train.Checkpoint(root=saved)
    saved.variables[-1].assign([3.0, 4.0])
    checkpoint.save(tmp_path / "c")
    path = checkpoint.save(tmp_path / "c")
    checkpoint = tf.train.Checkpoint(root=restored)
    checkpoint.restore(path).assert_existing_objects_matched()
    assert checkpoint.save_counter.numpy() == 2
    np.testing.assert_array_equal(restored.variables[-1], [3, 4])


# ----- Files of Keras -----


@pytest.mark.parametrize("num_replicas", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_model(name, num_replicas, mirrored, tmp_path):
    """Plain, wrapped, saved, loaded, unwrapped, saved and loaded."""
    strategy = mirrored(num_replicas)
    model = compile_model(make_model(strategy), strategy, False, name)
    pretend_to_train(model)
    before = kept(model)
    path = tmp_path / "m.keras"

    def save_and_load(model):
        model.save(path)
        with strategy.scope():
            return keras.saving.load_model(path)

    model = save_and_load(model)
    assert tf_regtopk.wrap(model, tf_regtopk.RegTopK(0.25)) is model
    assert_goes_on(model, before)
    assert_starts_without_errors(model)
    model = save_and_load(model)
    assert isinstance(model.optimizer, tf_regtopk.SparsifiedOptimizer)
    assert model.optimizer.density == 0.25
    assert_goes_on(model, before)
    assert tf_regtopk.unwrap(model) is model
    assert_goes_on(model, before)
    model = save_and_load(model)
    assert type(model.optimizer) is type(OPTIMIZERS[name]())
    assert_goes_on(model, before)


@pytest.mark.parametrize("name, like", [("momentum", "SGD"), ("adam", "Adam")])
def test_momentum_that_a_method_moves_to_the_replicas(
    name, like, mirrored, tmp_path, capfd
):
    """It is no variable of the inner optimizer, and that is told."""
    strategy = mirrored(2)
    plain = compile_model(make_model(strategy), strategy, False, name)
    pretend_to_train(plain)
    plain.save_weights(tmp_path / "m.weights.h5")
    model = make_model(strategy)
    with strategy.scope():
        model.compile(tf_regtopk.methods.recommended(OPTIMIZERS[name]()), "mse")
        model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "m.weights.h5")
    assert "The momentum that was saved is dropped" in capfd.readouterr().err
    assert_starts_without_errors(model)
    without_momentum = kept(plain)[: len(kept(model))]
    for value, expected in zip(kept(model), without_momentum, strict=True):
        np.testing.assert_array_equal(value, expected)
    with pytest.warns(UserWarning, match=f"ends with the.*{like}.*Received"):
        tf_regtopk.unwrap(model)


@pytest.mark.parametrize(
    "num_replicas", [2, pytest.param(0, marks=pytest.mark.slow)]
)
def test_trains_on_as_before(num_replicas, mirrored):
    """With all entries sent, wrapped training is plain training."""
    strategy = mirrored(num_replicas)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("f4")

    def train(wraps):
        keras.utils.set_random_seed(0)
        model = compile_model(make_model(strategy), strategy, False)
        model.fit(x, x[:, :2], verbose=0)
        if wraps:
            tf_regtopk.wrap(model, tf_regtopk.TopK(1.0))
        model.fit(x, x[:, :2], verbose=0)
        if wraps:
            assert model.optimizer.counters[0].numpy() == 1
            tf_regtopk.unwrap(model)
        model.fit(x, x[:, :2], verbose=0)
        return kept(model)

    for value, expected in zip(train(True), train(False), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_plain_model(mirrored, tmp_path, caplog):
    model = compile_model(make_model(mirrored(2)), mirrored(2), False)
    pretend_to_train(model)
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    other = compile_model(make_model(mirrored(2)), mirrored(2), True)
    pretend_to_train(other, seed=1)
    with caplog.at_level("WARNING", "tf_regtopk"):
        other.load_weights(path)
    [line] = [r.message for r in caplog.records if "start at zero" in r.message]
    assert f"'{other.optimizer.name}'" in line
    assert_goes_on(other, kept(model))
    assert_starts_without_errors(other)


@pytest.mark.parametrize("num_replicas", [0, 2])
def test_loss_scaling(num_replicas, mirrored, tmp_path):
    strategy = mirrored(num_replicas)

    def make():
        with strategy.scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            model.compile(
                keras.optimizers.LossScaleOptimizer(
                    keras.optimizers.Adam(0.1), dynamic_growth_steps=50
                ),
                "mse",
            )
            model.optimizer.build(model.trainable_variables)
        return model

    def check(model, class_):
        optimizer = model.optimizer
        assert type(optimizer) is class_
        assert optimizer.dynamic_growth_steps == 50
        assert optimizer.step_counter.numpy() == 9
        assert optimizer.dynamic_scale.numpy() == 4.0
        plain = optimizer.inner_optimizer
        plain = getattr(plain, "inner_optimizer", plain)
        assert type(plain) is keras.optimizers.Adam
        np.testing.assert_array_equal(plain.variables[2], np.full((4, 1), 5.0))

    model = make()
    model.optimizer.step_counter.assign(9)
    model.optimizer.dynamic_scale.assign(4.0)
    model.optimizer.inner_optimizer.variables[2].assign(np.full((4, 1), 5.0))
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    checkpoint = tf.train.Checkpoint(model=model).save(tmp_path / "c")
    check(tf_regtopk.wrap(model), tf_regtopk.LossScaleOptimizer)
    check(tf_regtopk.unwrap(model), keras.optimizers.LossScaleOptimizer)
    for load in (
        lambda model: model.load_weights(path),
        lambda model: (
            tf.train.Checkpoint(model=model)
            .restore(checkpoint)
            .assert_existing_objects_matched()
        ),
    ):
        model = tf_regtopk.wrap(make())
        load(model)
        check(model, tf_regtopk.LossScaleOptimizer)


def test_the_loss_scale_stays_where_momentum_is_moved(tmp_path):
    def compiled(optimizer):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    for make in (
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.Adam(0.1),
    ):
        model = compiled(keras.optimizers.LossScaleOptimizer(make()))
        model.optimizer.dynamic_scale.assign(64.0)
        model.save_weights(tmp_path / "m.weights.h5")
        ours = compiled(
            tf_regtopk.LossScaleOptimizer(
                tf_regtopk.methods.recommended(make())
            )
        )
        ours.load_weights(tmp_path / "m.weights.h5")
        assert ours.optimizer.dynamic_scale.numpy() == 64.0


def test_models_that_cannot_be_wrapped():
    model = make_model(tf.distribute.get_strategy())
    for function in (tf_regtopk.wrap, tf_regtopk.unwrap):
        with pytest.raises(ValueError, match="`model` must be compiled"):
            function(model)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be a `SparsifiedOptimizer`"):
        tf_regtopk.unwrap(model)
    with pytest.raises(ValueError, match="`scope` must be"):
        tf_regtopk.wrap(model, scope="all")
    assert type(model.optimizer) is keras.optimizers.SGD
    tf_regtopk.wrap(model)
    with pytest.raises(ValueError, match="must not be wrapped yet"):
        tf_regtopk.wrap(model)


# ----- For inference -----


@pytest.mark.parametrize("num_replicas", [0, 2])
def test_saved_model(num_replicas, mirrored, tmp_path):
    model = compile_model(
        make_model(mirrored(num_replicas)), mirrored(num_replicas), True
    )
    x = np.ones((3, 4), "f4")
    expected = model(x)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    signature = tf.saved_model.load(tmp_path / "saved").signatures[
        "serving_default"
    ]
    [output] = signature(tf.constant(x)).values()
    np.testing.assert_allclose(output, expected, rtol=1e-5)
    model.export(str(tmp_path / "exported"), verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(x), expected, rtol=1e-5)
