"""Replicas whose devices are not in the order of their names.

A program of its own, because TensorFlow allows one group of devices a process.
"""

import json
import sys

import flat_gradients
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

SIZE, NUM_STEPS = 101, 5


def main(result_path):
    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:1", "CPU:0"])
    with strategy.scope():
        variable = keras.Variable(np.zeros(SIZE), dtype="float32")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0),
            tf_regtopk.TopK(0.2),
            codec=tf_regtopk.Codec(values="natural"),
            topology=tf_regtopk.ReduceScatter(),
        )
        optimizer.build([variable])
    take_step = flat_gradients.step_function(strategy, optimizer, [variable])
    g = np.random.default_rng(0).standard_normal((NUM_STEPS, 2, SIZE))
    for of_step in g:
        take_step(of_step)
    residual = sum(part for [part] in optimizer.residual_errors())
    lost = residual - variable.numpy() - g.sum(axis=(0, 1))
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(
            {
                "largest_loss": float(np.abs(lost).max()),
                "largest_gradient": float(np.abs(g).max()),
            },
            f,
        )


if __name__ == "__main__":
    main(sys.argv[1])
