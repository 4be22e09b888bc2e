"""Several optimizers in one model: a GAN, as plain Keras and resumed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

DATA = np.random.default_rng(0).standard_normal((24, 3)).astype("float32")
LOSS = keras.losses.BinaryCrossentropy(from_logits=True, reduction="sum")


class Gan(keras.Model):
    """The usual one, with a `train_step` of its own."""

    def __init__(self, make_optimizer):
        super().__init__()
        dense = keras.layers.Dense
        self.generator = keras.Sequential(
            [keras.Input((2,)), dense(5, activation="tanh"), dense(3)]
        )
        self.discriminator = keras.Sequential(
            [keras.Input((3,)), dense(5, activation="tanh"), dense(1)]
        )
        self.g_optimizer, self.d_optimizer = make_optimizer(), make_optimizer()
        self.seeds = keras.random.SeedGenerator(1)
        self.built = True

    def build_optimizers(self):
        for optimizer, network in (
            (self.g_optimizer, self.generator),
            (self.d_optimizer, self.discriminator),
        ):
            optimizer.build(network.trainable_variables)

    def call(self, noise):
        return self.discriminator(self.generator(noise))

    def _loss(self, images, is_real):
        logits = self.discriminator(images)
        # The sum over the replicas is the mean over the batch.
        return LOSS(tf.fill(tf.shape(logits), is_real), logits) / 8

    def train_step(self, images):
        noise = keras.random.normal((4, 2), seed=self.seeds)
        for optimizer, network, loss in (
            (
                self.d_optimizer,
                self.discriminator,
                lambda: (
                    self._loss(images, 1.0)
                    + self._loss(self.generator(noise), 0.0)
                ),
            ),
            (
                self.g_optimizer,
                self.generator,
                lambda: self._loss(self.generator(noise), 1.0),
            ),
        ):
            weights = network.trainable_variables
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


def make(strategy, make_optimizer):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = Gan(make_optimizer)
        model.compile()
        model.build_optimizers()
    return model


def fit(model, epochs, initial_epoch=0, callbacks=()):
    model.fit(
        DATA,
        batch_size=8,
        epochs=epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def sparse(density):
    return lambda: tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.Adam(0.05), tf_regtopk.RegTopK(density)
    )


def test_as_with_plain_optimizers(mirrored):
    weights = []
    for make_optimizer in (lambda: keras.optimizers.Adam(0.05), sparse(1.0)):
        model = make(mirrored(2), make_optimizer)
        fit(model, epochs=1)
        weights.append(model.get_weights())
    for plain, wrapped in zip(*weights, strict=True):
        np.testing.assert_allclose(wrapped, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_is_backed_up_and_goes_on(mirrored, tmp_path):
    """To the bit; what each optimizer holds back is part of it."""
    model = make(mirrored(2), sparse(0.1))
    backup = tf_regtopk.Backup(tmp_path)
    warmup = tf_regtopk.DensityWarmup([0.5])
    assert backup.restore(model) == 0
    fit(model, epochs=2, callbacks=[warmup, backup])
    fit(model, epochs=3, initial_epoch=2, callbacks=[warmup])
    resumed = make(mirrored(2), sparse(0.1))
    backup = tf_regtopk.Backup(tmp_path)
    assert backup.restore(resumed) == 2
    fit(resumed, epochs=3, initial_epoch=2, callbacks=[warmup, backup])
    for one, other in zip(model.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("g_optimizer", "d_optimizer"):
        optimizers = [getattr(m, name) for m in (model, resumed)]
        assert optimizers[0].density == optimizers[1].density == 0.1
        errors = [o.save_state().replicas[1][0] for o in optimizers]
        assert np.any(errors[0])
        np.testing.assert_array_equal(*errors)


def test_not_built(mirrored, tmp_path):
    with mirrored(2).scope():
        model = Gan(sparse(0.1))
        model.compile()
    with pytest.raises(ValueError, match="All optimizers of `model` must be"):
        tf_regtopk.Backup(tmp_path).restore(model)
