"""Small models, and how they are trained and compared."""

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

INNER_OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


def small_data(size=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, 6)).astype(np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True)) + 0.1 * x[:, :1]
    return x, y.astype(np.float32)


def build_mlp(dtype=None):
    return keras.Sequential(
        [
            keras.layers.Dense(5, activation="tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


def fit(strategy, optimizer_fn, build_fn=build_mlp, data=None, **arguments):
    """Compiles and fits a model, built lazily; returns it."""
    x, y = data or small_data()
    for_compile = {
        name: arguments.pop(name)
        for name in ("run_eagerly", "jit_compile", "steps_per_execution")
        if name in arguments
    }
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = build_fn()
        model.compile(
            optimizer=optimizer_fn(), loss="mse", metrics=["mae"], **for_compile
        )
    arguments = {"epochs": 1, "batch_size": 12, **arguments}
    model.fit(x, y, shuffle=False, verbose=0, **arguments)
    return model


def residual_errors(optimizer):
    """One array for each replica."""
    return [
        arrays[0]
        for arrays in optimizer._partition.feedback_state.local_arrays()
    ]


def wrap(inner_fn, *args, **kwargs):
    return lambda: tf_regtopk.SparsifiedOptimizer(inner_fn(), *args, **kwargs)


def assert_weights_close(model, other, **tolerances):
    for w, w_other in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(w, w_other, **tolerances)


def assert_weights_equal(model, other):
    for w, w_other in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(w, w_other)


def custom_loop_step(strategy, optimizer, variables, gradients_fn):
    def replica_step():
        replica = tf.distribute.get_replica_context()
        optimizer.apply(
            gradients_fn(replica.replica_id_in_sync_group), variables
        )

    strategy.run(replica_step)
