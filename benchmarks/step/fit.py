"""Milliseconds that a step of `fit` takes for a small model; its first seconds.

Everything around the exchange shows here: reads, checks, calls of compiled
functions. Epochs of plain Keras and of the wrapper take turns. The first epoch
of each traces and compiles, which takes the longer the more replicas there are.

    python -m benchmarks.step.fit
"""

import json
import os
import statistics
import time

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

_NUM_INPUTS, _NUM_STEPS, _BATCH_SIZE = 100, 100, 32


def define_flags():
    flags.DEFINE_integer("replicas", 2, "Logical CPUs.", lower_bound=1)
    flags.DEFINE_integer("units", 196, "Hidden units, of 102 weights each.")
    flags.DEFINE_float("density", 0.01, "k / J.")
    flags.DEFINE_integer("epochs", 9, "Timed epochs of each.", lower_bound=1)
    flags.DEFINE_string("output_dir", "results/fit", "Where the results go.")


def optimizers(density):
    """Functions that make an optimizer, by name.

    Those whose names have "Monitor" train with it.
    """

    def sgd():
        return keras.optimizers.SGD(0.01)

    sparsifier = tf_regtopk.RegTopK(density)
    return {
        "SGD": sgd,
        "RegTopK": lambda: tf_regtopk.SparsifiedOptimizer(sgd(), sparsifier),
        "RegTopK, Monitor": lambda: tf_regtopk.SparsifiedOptimizer(
            sgd(), sparsifier
        ),
        "telemetry": lambda: tf_regtopk.SparsifiedOptimizer(
            sgd(), sparsifier, telemetry=True
        ),
        "telemetry, Monitor": lambda: tf_regtopk.SparsifiedOptimizer(
            sgd(), sparsifier, telemetry=True
        ),
        "dense": lambda: tf_regtopk.SparsifiedOptimizer(
            sgd(), sparsifier, exchange="dense"
        ),
    }


def make_model(optimizer, units):
    model = keras.Sequential(
        [
            keras.Input((_NUM_INPUTS,)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer=optimizer(), loss="mse")
    return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * args.replicas
    )
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{n}" for n in range(args.replicas)]
    )
    x = np.random.default_rng(0).standard_normal(
        (_NUM_STEPS * _BATCH_SIZE, _NUM_INPUTS), np.float32
    )
    y = x.sum(axis=1, keepdims=True)
    with strategy.scope():
        models = {
            name: make_model(optimizer, args.units)
            for name, optimizer in optimizers(args.density).items()
        }
    milliseconds = {name: [] for name in models}
    first = {}
    for epoch in range(1 + args.epochs):
        for name, model in models.items():
            start = time.perf_counter()
            model.fit(
                x,
                y,
                batch_size=_BATCH_SIZE,
                shuffle=False,
                verbose=0,
                callbacks=[tf_regtopk.Monitor()] if "Monitor" in name else [],
            )
            seconds = time.perf_counter() - start
            if epoch:
                milliseconds[name].append(1e3 * seconds / _NUM_STEPS)
            else:
                first[name] = seconds
    plain = statistics.median(milliseconds["SGD"])
    results = {}
    for name, times in milliseconds.items():
        low, high = map(float, np.percentile(times, [10, 90]))
        results[name] = {
            "milliseconds": statistics.median(times),
            "10_to_90_percent": [low, high],
            "first_epoch_seconds": first[name],
        }
        print(
            f"{name:18} {statistics.median(times):7.2f} ms a step "
            f"({low:.2f}-{high:.2f}), {statistics.median(times) - plain:5.2f} "
            f"more than SGD; first epoch {first[name]:.1f} s"
        )
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(results, f, indent=2)


if __name__ == "__main__":
    define_flags()
    app.run(main)
