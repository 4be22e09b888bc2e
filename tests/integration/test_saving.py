"""Saving and loading rebuild the wrapper around the inner optimizer."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk


def make_optimizer():
    return tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.01, 100), clipnorm=1.0
        ),
        tf_regtopk.RegTopK(0.2, mu=3.0, q=10.0, denominator="current"),
        scope="per_variable",
        dense_below=3,
        name="mine",
    )


def train(strategy, optimizer_fn=make_optimizer, epochs=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 4)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(optimizer=optimizer_fn(), loss="mse")
    model.fit(x, y, batch_size=6, epochs=epochs, verbose=0)
    return model


def assert_same_wrapper(optimizer):
    assert isinstance(optimizer, tf_regtopk.SparsifiedOptimizer)
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.AdamW)
    assert optimizer.inner_optimizer.clipnorm == 1.0
    assert optimizer.sparsifier == make_optimizer().sparsifier
    assert optimizer.scope == "per_variable"
    assert optimizer.dense_below == 3
    assert optimizer.name == "mine"


def test_config_round_trip():
    config = make_optimizer().get_config()
    unchanged = copy.deepcopy(config)
    assert_same_wrapper(tf_regtopk.SparsifiedOptimizer.from_config(config))
    assert config == unchanged
    assert_same_wrapper(
        keras.optimizers.deserialize(
            keras.optimizers.serialize(make_optimizer())
        )
    )


def test_custom_inner_optimizer():
    class MySGD(keras.optimizers.SGD):
        pass

    optimizer = tf_regtopk.SparsifiedOptimizer(MySGD(0.5))
    config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(
        config, custom_objects={"MySGD": MySGD}
    )
    assert type(loaded.inner_optimizer) is MySGD


@pytest.mark.parametrize(
    "trained_on, loaded_on",
    [
        (2, 2),
        pytest.param(0, 0, marks=pytest.mark.slow),
        pytest.param(3, 0, marks=pytest.mark.slow),
    ],
)
def test_model_file(trained_on, loaded_on, mirrored, tmp_path):
    model = train(mirrored(trained_on))
    path = tmp_path / "m.keras"
    model.save(path)
    with mirrored(loaded_on).scope():
        loaded = keras.saving.load_model(path)
    assert_same_wrapper(loaded.optimizer)
    for w, w_loaded in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(w, w_loaded)
    names = [v.path for v in model.optimizer.variables]
    assert len(set(names)) == len(names)
    for v, v_loaded in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(v.numpy(), v_loaded.numpy(), v.path)
    assert loaded.optimizer.iterations.numpy() == 8
    # Training goes on.
    loaded.fit(np.ones((8, 4), "f4"), np.ones((8, 1), "f4"), verbose=0)
    assert loaded.optimizer.iterations.numpy() == 9


def test_loading_before_the_optimizer_is_built(tmp_path):
    train(tf.distribute.get_strategy()).save_weights(tmp_path / "m.weights.h5")
    model = train(tf.distribute.get_strategy(), epochs=0)
    with pytest.warns(UserWarning, match="'mine' is not built yet") as caught:
        model.load_weights(tmp_path / "m.weights.h5")
    assert len([w for w in caught if "optimizer" in str(w.message)]) == 1
    model.fit(np.ones((8, 4), "f4"), np.ones((8, 1), "f4"), verbose=0)
    assert copy.deepcopy(make_optimizer()).name == "mine"


def test_tensorflow_checkpoint(mirrored, tmp_path):
    def sgd():
        return tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1, momentum=0.9), tf_regtopk.RegTopK(0.5)
        )

    model = train(mirrored(2), sgd)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
        tmp_path / "checkpoint"
    )
    other = train(mirrored(2), sgd, epochs=0)
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(
        path
    ).assert_existing_objects_matched()
    for v, v_other in zip(
        model.optimizer.variables, other.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(v.numpy(), v_other.numpy(), v.path)


def test_backup_and_restore_and_model_checkpoint(tmp_path):
    callbacks = [
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.keras", monitor="loss"
        ),
    ]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=make_optimizer(), loss="mse")
    x = np.ones((8, 4), "f4")
    model.fit(x, x[:, :1], epochs=2, callbacks=callbacks, verbose=0)
    assert_same_wrapper(
        keras.saving.load_model(tmp_path / "best.keras").optimizer
    )


def test_a_model_saved_before_it_was_trained(tmp_path):
    """Nothing is in the file; what is there stays."""
    path = tmp_path / "m.keras"
    train(tf.distribute.get_strategy(), epochs=0).save(path)
    with pytest.warns(UserWarning, match="'mine' was not built yet"):
        loaded = keras.saving.load_model(path)
    assert_same_wrapper(loaded.optimizer)
    weights = tmp_path / "m.weights.h5"
    train(tf.distribute.get_strategy(), epochs=0).save_weights(weights)
    model = train(tf.distribute.get_strategy())
    before = [v.numpy() for v in model.optimizer.variables]
    with pytest.warns(UserWarning, match="'mine' was not built yet"):
        model.load_weights(weights)
    for value, variable in zip(before, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_a_model_of_which_layers_were_frozen_later(tmp_path):
    model = train(tf.distribute.get_strategy())
    model.add(keras.layers.Dense(1))
    model.layers[0].trainable = False
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="frozen or unfrozen before it was"):
        keras.saving.load_model(tmp_path / "m.keras")
    keras.saving.load_model(tmp_path / "m.keras", compile=False)


def test_set_weights():
    optimizer = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1, 0.9))
    optimizer.build([keras.Variable(np.zeros(3))])
    weights = [np.full(v.shape, 7, v.dtype) for v in optimizer.variables]
    optimizer.set_weights(weights)
    for variable in optimizer.variables:
        np.testing.assert_array_equal(variable, np.full(variable.shape, 7))
    with pytest.raises(ValueError, match="`weights` must have variables of"):
        optimizer.set_weights([0 * w for w in weights][:-1])
    for variable in optimizer.variables:
        np.testing.assert_array_equal(variable, np.full(variable.shape, 7))
