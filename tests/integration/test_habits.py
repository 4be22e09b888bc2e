"""What users do with `fit`: as with the plain optimizer, on 2 replicas.

At density 1.0 nothing is held back, so that every habit must give the weights
that the inner optimizer alone gives, but for the rounding of sums.
"""

import gc

import keras
import numpy as np
import pytest
import small_models

import tf_regtopk

RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 6)).astype("float32")
Y = (X[:, :1] - X[:, 1:2] > 0).astype("float32")


def sgd():
    return keras.optimizers.SGD(0.2, momentum=0.5)


def dense(*arguments, **kwargs):
    return keras.layers.Dense(*arguments, **kwargs)


def mlp(**kwargs):
    return keras.Sequential(
        [keras.Input((6,)), dense(4, activation="tanh", **kwargs), dense(1)]
    )


def two_outputs():
    x = keras.Input((6,))
    hidden = dense(4, activation="tanh")(x)
    outputs = {
        "a": dense(1, name="a")(hidden),
        "b": dense(1, name="b")(hidden),
    }
    return keras.Model(x, outputs)


def tied():
    """The second half of the features goes through the same weights."""
    x = keras.Input((6,))
    shared = dense(4, activation="tanh")
    halves = [shared(x[:, :3]), shared(x[:, 3:])]
    return keras.Model(x, dense(1)(keras.layers.add(halves)))


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Reshape((3, 2)),
            keras.layers.GRU(3),
            dense(1),
        ]
    )


def normalised():
    return keras.Sequential(
        [
            keras.Input((6,)),
            dense(4),
            keras.layers.BatchNormalization(synchronized=True),
            dense(1),
        ]
    )


def transformer():
    """In bfloat16, whose variables and gradients are float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = keras.Input((6,))
    tokens = keras.layers.Reshape((3, 2))(x)
    attended = keras.layers.MultiHeadAttention(2, 4)(tokens, tokens)
    mixed = keras.layers.LayerNormalization()(
        keras.layers.add([tokens, attended])
    )
    pooled = keras.layers.GlobalAveragePooling1D()(mixed)
    return keras.Model(x, dense(1, dtype="float32")(pooled))


def fit(model, x=X, y=Y, **kwargs):
    arguments = {"batch_size": 8, "epochs": 2, "shuffle": False, **kwargs}
    model.fit(x, y, verbose=0, **arguments)


def swap_averages(model):
    fit(model, callbacks=[keras.callbacks.SwapEMAWeights(True)])


def weigh_classes(model):
    fit(model, class_weight={0: 0.5, 1: 2.0})


def weigh_samples(model):
    fit(model, sample_weight=np.linspace(0, 1, len(X)))


def weigh_outputs(model):
    fit(model, y={"a": Y, "b": 1 - Y})


def restore_best_weights(model):
    """The learning rate rises until the loss does, and the best is kept."""
    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    rise = keras.callbacks.LearningRateScheduler(lambda i: 0.1 * 16.0**i)
    fit(model, epochs=4, validation_data=(X, Y), callbacks=[rise, stop])
    assert stop.stopped_epoch
    fit(model, epochs=1)  # Goes on from the best.


def reduce_learning_rate(model):
    fit(
        model,
        epochs=4,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau("loss", min_delta=9, patience=1)
        ],
    )
    assert model.optimizer.learning_rate < 0.01


def train_on_batches(model):
    for start in (0, 8, 16):
        batch = slice(start, start + 8)
        model.train_on_batch(X[batch], Y[batch])


HABITS = {
    "averages": (
        mlp,
        swap_averages,
        lambda: keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=0.5),
    ),
    "class_weight": (mlp, weigh_classes, sgd),
    "sample_weight": (mlp, weigh_samples, sgd),
    "constraint": (
        lambda: mlp(kernel_constraint=keras.constraints.MaxNorm(0.5)),
        fit,
        sgd,
    ),
    "outputs": (two_outputs, weigh_outputs, sgd),
    "tied": (tied, fit, sgd),
    "recurrent": (recurrent, fit, sgd),
    "batch_norm": (normalised, fit, sgd),
    "transformer": (transformer, fit, sgd),
    "early_stopping": (mlp, restore_best_weights, sgd),
    "plateau": (mlp, reduce_learning_rate, sgd),
    "schedule": (
        mlp,
        fit,
        lambda: keras.optimizers.Adam(
            keras.optimizers.schedules.PiecewiseConstantDecay(
                [2, 4], [0.1, 0.05, 0.01]
            )
        ),
    ),
    "train_on_batch": (mlp, train_on_batches, sgd),
}


SLOW = (
    "class_weight",
    "constraint",
    "plateau",
    "recurrent",
    "sample_weight",
    "schedule",
    "tied",
)


@pytest.mark.parametrize(
    "habit",
    [
        pytest.param(habit, marks=[pytest.mark.slow] * (habit in SLOW))
        for habit in HABITS
    ],
)
def test_as_with_the_plain_optimizer(habit, mirrored):
    build, train, inner = HABITS[habit]
    trained = []
    for is_wrapped in (False, True):
        keras.utils.set_random_seed(1)
        with mirrored(2).scope():
            model = build()
            optimizer = inner()
            if is_wrapped:
                optimizer = tf_regtopk.SparsifiedOptimizer(
                    optimizer, tf_regtopk.TopK(1.0)
                )
            model.compile(optimizer, "mse", jit_compile=False)
        initial = model.get_weights()
        train(model)
        trained.append(model)
    # A sum in another order may be the next bfloat16.
    atol = 1e-3 if habit == "transformer" else 1e-5
    small_models.assert_weights_close(*trained, rtol=1e-4, atol=atol)
    assert any(
        np.any(a != b)
        for a, b in zip(initial, model.get_weights(), strict=True)
    )
    plain, wrapped = (model.optimizer for model in trained)
    assert wrapped.iterations.numpy() == plain.iterations.numpy()
    np.testing.assert_allclose(
        wrapped.learning_rate.numpy(), plain.learning_rate.numpy()
    )


def test_models_are_freed_with_their_optimizers(mirrored):
    """Many are built, as in a search for hyper-parameters."""

    def count():
        gc.collect()
        return sum(
            type(o).__name__ in ("SparsifiedOptimizer", "ResourceVariable")
            for o in gc.get_objects()
        )

    def build():
        with mirrored(2).scope():
            model = mlp()
            model.compile(
                tf_regtopk.SparsifiedOptimizer(
                    sgd(), exchange="dense", accumulation_steps=2
                ),
                "mse",
            )
            model.optimizer.build(model.trainable_variables)
        keras.utils.clear_session(free_memory=False)

    build()
    before = count()
    for _ in range(3):
        build()
    assert count() <= before
