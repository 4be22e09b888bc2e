"""A density that changes while a model trains."""

import flat_gradients
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

NUM_EPOCHS, BATCHES = 4, 3
WARMUP = (0.5, 0.25)


def make_model(strategy, rule=None, sparsifier=None):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(7, "tanh", kernel_initializer="ones"),
                keras.layers.Dense(1, kernel_initializer="ones"),
            ]
        )
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1),
                sparsifier or tf_regtopk.RegTopK(0.1, mu=2.0),
                error_feedback=rule,
            ),
            loss="mse",
        )
    return model


def make_data():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4 * BATCHES, 5)).astype("float32")
    y = rng.standard_normal((4 * BATCHES, 1)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


class Recorder(keras.callbacks.Callback):
    """The density of each epoch, and how many entries moved in its steps."""

    def __init__(self):
        super().__init__()
        self.densities, self.num_moved = [], []

    def weights(self):
        return np.concatenate([w.ravel() for w in self.model.get_weights()])

    def on_epoch_begin(self, epoch, logs=None):
        self.densities.append(self.model.optimizer.density)
        self.num_moved.append([])

    def on_train_batch_begin(self, batch, logs=None):
        self._before = self.weights()

    def on_train_batch_end(self, batch, logs=None):
        moved = np.count_nonzero(self.weights() != self._before)
        self.num_moved[-1].append(moved)


class StopAfter(keras.callbacks.Callback):
    """Ends a training before its last epoch."""

    def __init__(self, num_epochs):
        super().__init__()
        self._num_epochs = num_epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 == self._num_epochs


def fit(model, callbacks, initial_epoch=0, epochs=NUM_EPOCHS):
    model.fit(
        make_data(),
        initial_epoch=initial_epoch,
        epochs=epochs,
        callbacks=callbacks,
        shuffle=False,
        verbose=0,
    )


def test_density_follows_the_epochs(mirrored):
    """Of 50 entries; with one replica, exactly k move."""
    model, recorder = make_model(mirrored(0)), Recorder()
    fit(model, [tf_regtopk.DensityWarmup(WARMUP), recorder])
    assert recorder.densities == [0.5, 0.25, 0.1, 0.1]
    assert recorder.num_moved == [[25] * 3, [12] * 3, [5] * 3, [5] * 3]
    assert model.optimizer.density == model.optimizer.sparsifier.density == 0.1


def test_a_density_that_comes_back_is_not_compiled_again(mirrored):
    """TensorFlow would keep the other program until the process ends."""
    model = make_model(mirrored(0), sparsifier=tf_regtopk.TopK(0.1))
    fit(model, [tf_regtopk.DensityWarmup([0.5, 0.1, 0.5, 0.1])], epochs=4)
    send = model.optimizer._partition.sparse_step.send
    assert send.function.experimental_get_tracing_count() == 1


def test_ends_with_the_density_of_a_sparsifier_without(mirrored):
    model = make_model(mirrored(0), sparsifier=tf_regtopk.TopK())
    recorder = Recorder()
    fit(model, [tf_regtopk.DensityWarmup([0.5]), recorder], epochs=2)
    assert recorder.densities == [0.5, 1.0]
    assert recorder.num_moved == [[25] * 3, [50] * 3]


@pytest.mark.slow
def test_without_memory(mirrored):
    """Nothing of a step's arguments then tells one density from another."""
    model = make_model(mirrored(0), sparsifier=tf_regtopk.TopK(0.1))
    recorder = Recorder()
    fit(model, [tf_regtopk.DensityWarmup(WARMUP), recorder], epochs=3)
    assert recorder.num_moved == [[25] * 3, [12] * 3, [5] * 3]


@pytest.mark.slow
def test_errors_are_kept(mirrored):
    """Also on several replicas: all that was not sent is still there."""
    with mirrored(2).scope():
        variable = keras.Variable(np.zeros(40), dtype="float64")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.RegTopK(0.5)
        )
        optimizer.build([variable])
    rng = np.random.default_rng(0)
    total = np.zeros(40)
    for density in (0.5, 0.1, 0.3):
        optimizer.set_density(density)
        take_step = flat_gradients.step_function(
            mirrored(2), optimizer, [variable]
        )
        for _ in range(2):
            g = rng.standard_normal((2, 40))
            take_step(g)
            total += g.sum(axis=0)
    replicas = optimizer.save_state().replicas
    errors = replicas[0][0] + replicas[1][0]
    assert np.count_nonzero(errors) > 20
    np.testing.assert_allclose(errors - variable.numpy(), total, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_callback, densities",
    [
        (lambda: tf_regtopk.DensityWarmup([0.25] * 3), [0.25] * 3 + [0.1]),
        (
            lambda: tf_regtopk.DensityDecay(lambda epoch: float(epoch < 3)),
            [0.1333] * 3 + [0.001],
        ),
    ],
)
def test_resumes_at_the_density_of_its_epoch(
    make_callback, densities, mirrored, tmp_path
):
    """To the bit."""
    strategy, rule = mirrored(2), tf_regtopk.LearnedShift(momentum=0.5)
    model = make_model(strategy, rule)
    fit(model, [make_callback()])

    stopped = make_model(strategy, rule)
    backup = tf_regtopk.Backup(tmp_path / "backup")
    assert backup.restore(stopped) == 0
    # Of as many epochs as the whole run has.
    fit(stopped, [make_callback(), StopAfter(2), backup])

    resumed = make_model(strategy, rule)
    backup = tf_regtopk.Backup(tmp_path / "backup")
    assert backup.restore(resumed) == 2
    assert resumed.optimizer.density == densities[1]
    recorder = Recorder()
    fit(resumed, [make_callback(), recorder, backup], initial_epoch=2)
    assert recorder.densities == densities[2:]
    for a, b in zip(model.get_weights(), resumed.get_weights(), strict=True):
        assert a.tobytes() == b.tobytes()
    saved = model.optimizer.save_state().replicas
    for n, parts in resumed.optimizer.save_state().replicas.items():
        assert [p.tobytes() for p in parts] == [p.tobytes() for p in saved[n]]


def test_state_of_another_density_fits_another_world(mirrored):
    model = make_model(mirrored(2))
    fit(model, [tf_regtopk.DensityWarmup((0.5,))], epochs=1)
    saved = model.optimizer.save_state()
    alone = make_model(mirrored(0))
    alone.optimizer.build(alone.trainable_variables)
    with pytest.warns(UserWarning, match="Saved by 2 replicas"):
        alone.optimizer.load_state(saved)
    assert alone.optimizer.density == 0.5
    error, indices, ratios = alone.optimizer.save_state().replicas[0]
    assert len(indices) == len(ratios) == 25
    np.testing.assert_allclose(
        error, saved.replicas[0][0] + saved.replicas[1][0], rtol=1e-6
    )


def test_a_function_of_another_density_raises(mirrored):
    """And changes nothing: it would send another number of entries."""
    model = make_model(mirrored(2), sparsifier=tf_regtopk.TopK(0.1))
    fit(model, [], epochs=1)
    before = [w.tobytes() for w in model.get_weights()]
    model.optimizer.set_density(0.3)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="traced before the last change"
    ):
        fit(model, [], epochs=1)
    assert [w.tobytes() for w in model.get_weights()] == before
    model.optimizer.set_density(0.1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="traced again"):
        fit(model, [], epochs=1)
    model.make_train_function(force=True)
    fit(model, [], epochs=1)
    assert [w.tobytes() for w in model.get_weights()] != before


def test_nothing_is_traced_again_in_the_next_fit(mirrored):
    model = make_model(mirrored(0))
    warmup = tf_regtopk.DensityWarmup((0.5,))
    fit(model, [warmup])
    function = model.train_function
    fit(model, [warmup], initial_epoch=2)
    assert model.train_function is function


def test_under_loss_scaling(mirrored):
    model = make_model(mirrored(0))
    wrapped = tf_regtopk.LossScaleOptimizer(model.optimizer)
    model.compile(wrapped, loss="mse")
    fit(model, [tf_regtopk.DensityWarmup((0.5,))], epochs=1)
    assert wrapped.inner_optimizer.density == 0.5


def test_bad_arguments(mirrored):
    with pytest.raises(ValueError, match=r"all in \(0, 1\]. Received: .*=0"):
        tf_regtopk.DensityWarmup((0.5, 0))
    with pytest.raises(TypeError, match="Received: densities='0.5'"):
        tf_regtopk.DensityWarmup(["0.5"])
    with pytest.raises(TypeError, match="must be a list of floats .*=0.5"):
        tf_regtopk.DensityWarmup(0.5)
    model = make_model(mirrored(0))
    with pytest.raises(ValueError, match="must be built before `set_density`"):
        model.optimizer.set_density(0.5)
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]. Received: .*2"):
        model.optimizer.set_density(2)
    assert model.optimizer.density == 0.1
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="must be a `SparsifiedOptimizer`"):
        fit(model, [tf_regtopk.DensityWarmup()])
