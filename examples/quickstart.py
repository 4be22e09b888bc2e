"""Trains a small network on two replicas that send few gradient entries.

A reader learns what changes in a Keras program: a strategy, a model that is
compiled in its scope, and `SparsifiedOptimizer` around the optimizer.

    python examples/quickstart.py
"""

from absl import app
from absl import flags
import keras
import sklearn.datasets
import tensorflow as tf

import tf_regtopk


def define_flags():
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)


def load_digits():
    """Images `[1797, 64]` that ship with scikit-learn, and their digits."""
    images, digits = sklearn.datasets.load_digits(return_X_y=True)
    return images.astype("float32") / 16, digits


def make_strategy():
    """A replica on each GPU, or two on the CPU where there is no GPU."""
    tf.get_logger().setLevel("WARNING")  # It would note every reduction.
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    # tf.data's background threads starve where replicas share few cores.
    tf.data.experimental.enable_debug_mode()
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def build_model(optimizer):
    """A network of 17,226 weights. To be called in the strategy's scope."""
    model = keras.Sequential(
        [
            keras.Input([64]),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    images, digits = load_digits()
    with make_strategy().scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.05, momentum=0.9),
            sparsifier=tf_regtopk.RegTopK(density=0.05),
        )
        model = build_model(optimizer)
    model.fit(
        images,
        digits,
        batch_size=64,
        epochs=flags.FLAGS.epochs,
        validation_split=0.2,
        verbose=2,
    )
    print(optimizer.wire_report())


if __name__ == "__main__":
    define_flags()
    app.run(main)
