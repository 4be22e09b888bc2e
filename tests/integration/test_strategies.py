"""Several strategies, one after the other, in one process, as in a notebook."""

import os
import subprocess
import sys

import paths

# TensorFlow's collectives never forget the shape that belongs to a key, so a
# training that was plain, or sent payloads of another length, comes before.
PROGRAM = """
import keras, numpy as np, tensorflow as tf, tf_regtopk
from tf_regtopk import SparsifiedOptimizer, TopK

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
x = np.random.default_rng(0).standard_normal((24, 7)).astype("float32")

def train(wrap, num_replicas=2):
    keras.utils.set_random_seed(0)
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_replicas)])
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(5), keras.layers.Dense(1)])
        model.compile(wrap(keras.optimizers.SGD(0.05)), "mse")
    model.fit(x, x[:, :1], batch_size=12, verbose=0, shuffle=False)
    return model.get_weights()

plain = train(lambda inner: inner)
train(lambda inner: SparsifiedOptimizer(inner, TopK(0.3)))
train(lambda inner: SparsifiedOptimizer(inner, TopK(0.3), dense=["bias"]))
train(tf_regtopk.DecentralizedOptimizer)
train(lambda inner: SparsifiedOptimizer(inner, TopK(0.3)), 3)
again = train(lambda inner: SparsifiedOptimizer(inner, TopK(1.0)))
for a, b in zip(plain, again, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
print("All were trained.")
"""


def test_strategies_one_after_the_other():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=paths.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.endswith("All were trained.\n")
