"""The program of `test_accumulation_workers.py`, on each of two workers.

python accumulation_program.py RESULT [bytes]
"""

import json
import os
import sys

import exchange_program
import flat_gradients
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

NUM_BATCHES = 4  # Of an accumulation.
WAYS = {
    "both": {"dense_below": 10},
    "dense": {"exchange": "dense"},
}
WIDTH = 300


def gradients(num_replicas):
    """`[two exchanges, batches of each, num_replicas, J]`."""
    shape = (2, NUM_BATCHES, num_replicas, exchange_program.SIZE)
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def train(strategy, g, **kwargs):
    """The weights after gradients `[steps, num_replicas, J]`."""
    optimizer, variables = exchange_program.make(strategy, **kwargs)
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    for of_step in g:
        take_step(of_step)
    return flat_gradients.flat_weights(variables).tolist()


class SilentModel(keras.Sequential):
    """What `fit` sends when no optimizer does."""

    def train_step(self, data):
        x, y = data
        loss = self.compute_loss(x, y, self(x, training=True))
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, self(x), None)


class Bytes(keras.callbacks.Callback):
    """Counts what all workers send in each batch of `fit`."""

    def __init__(self):
        super().__init__()
        self.of_batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.of_batches.append(exchange_program.sent_bytes())


def fit(strategy, optimizer, model_class=keras.Sequential, **kwargs):
    """Bytes of each batch of `fit`, what the optimizer counted, the weights."""
    x = np.random.default_rng(0).standard_normal((96, WIDTH), np.float32)
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = model_class(
            [keras.Input((WIDTH,)), keras.layers.Dense(WIDTH, name="dense")]
        )
        model.compile(optimizer=optimizer(), loss="mse", **kwargs)
    counter = Bytes()
    model.fit(x, x, batch_size=4, shuffle=False, verbose=0, callbacks=[counter])
    # The first accumulation traces, and says hello to the other worker.
    return (
        np.diff(counter.of_batches)[NUM_BATCHES - 1 :].tolist(),
        int(model.optimizer.iterations.numpy()),
        model.get_weights()[0].tolist(),
    )


def bytes_in_loop(strategy, **kwargs):
    """Bytes of each batch of a custom loop, after two exchanges."""
    optimizer, variables = exchange_program.make(strategy, **kwargs)
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    g = np.ones((2, exchange_program.SIZE), np.float32)
    counts = [exchange_program.sent_bytes()]
    for _ in range(6 * NUM_BATCHES):
        take_step(g)
        counts.append(exchange_program.sent_bytes())
    return np.diff(counts)[2 * NUM_BATCHES :].tolist()


def main(result_path, counted=None):
    tf.data.experimental.enable_debug_mode()
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    g = gradients(2).reshape(2 * NUM_BATCHES, 2, -1)

    def wrapped():
        return tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            tf_regtopk.TopK(0.1),
            accumulation_steps=NUM_BATCHES,
        )

    def plain():
        return keras.optimizers.SGD(0.1)

    result = {
        "weights": {
            way: train(strategy, g, accumulation_steps=NUM_BATCHES, **kwargs)
            for way, kwargs in WAYS.items()
        },
        "fit": fit(strategy, wrapped),
        "several_steps": fit(strategy, wrapped, steps_per_execution=3),
    }
    if counted:
        result |= {
            "loop": bytes_in_loop(strategy, accumulation_steps=NUM_BATCHES),
            "plain": fit(strategy, plain),
            "silent": fit(strategy, plain, SilentModel),
        }
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
