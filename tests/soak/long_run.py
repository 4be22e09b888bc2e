r"""Trains for many steps, and sees that memory, threads and files stay flat.

    python tests/soak/long_run.py --steps=10000

Four replicas train through `fit`, with a backup after every 500 steps, and now
and then a gradient that is not a number. Prints what is in use after each 1,000
steps, and fails if resident memory at the end differs by more than 2 % from
that after the first 1,000, or there are more threads, open files, or traced
functions.
"""

import gc
import os
import tempfile

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

STEPS_PER_EPOCH = 500

flags.DEFINE_integer("steps", 10_000, "Steps to train.", lower_bound=2000)
flags.DEFINE_integer("replicas", 4, "Number of replicas.", lower_bound=1)


def in_use():
    """Resident memory in MB, and the numbers of threads and open files."""
    gc.collect()
    with open("/proc/self/status", encoding="utf-8") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {
        "resident_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }


class Watch(keras.callbacks.Callback):
    """Records what is in use after every 1,000 steps."""

    def __init__(self, optimizer):
        super().__init__()
        self._optimizer = optimizer
        self.records = []

    def on_epoch_end(self, epoch, logs=None):
        steps = (epoch + 1) * STEPS_PER_EPOCH
        if steps % 1000 == 0:
            traced = [self.model.num_traced]
            for function in (
                self._optimizer._partition.sparse_step.send,
                self._optimizer._partition.sparse_step.settle,
            ):
                traced.append(
                    function.function.experimental_get_tracing_count()
                )
            assert all(traced), traced
            self.records.append(in_use() | {"traced": sum(traced)})
            print(steps, self.records[-1], flush=True)


class Model(keras.Sequential):
    """Counts how often its training step is traced."""

    num_traced = 0

    def train_step(self, data):
        self.num_traced += 1
        return super().train_step(data)


def make_dataset(batch_size):
    """Endless batches, of which one in 997 holds a NaN."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((997, batch_size, 32)).astype("float32")
    x[500, 0, 0] = np.nan
    y = np.nan_to_num(x).sum(axis=2, keepdims=True)
    return tf.data.Dataset.from_tensor_slices((x, y)).repeat()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    tf.get_logger().setLevel("WARNING")
    tf.data.experimental.enable_debug_mode()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * args.replicas,
    )
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(args.replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    with strategy.scope():
        model = Model(
            [
                keras.Input((32,)),
                keras.layers.Dense(256, activation="relu"),
                keras.layers.Dense(1),
            ]
        )
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.Adam(1e-3), tf_regtopk.RegTopK(0.01)
        )
        model.compile(optimizer, "mse")
    watch = Watch(optimizer)
    with tempfile.TemporaryDirectory() as directory:
        backup = tf_regtopk.Backup(directory)
        backup.restore(model)
        model.fit(
            make_dataset(8 * args.replicas),
            epochs=args.steps // STEPS_PER_EPOCH,
            steps_per_epoch=STEPS_PER_EPOCH,
            callbacks=[backup, watch],
            verbose=0,
        )
    first, last = watch.records[0], watch.records[-1]
    skipped = int(optimizer.skipped_steps.numpy())
    assert skipped == (args.steps + 496) // 997, skipped
    growth = last["resident_mb"] / first["resident_mb"] - 1
    print(f"Resident memory: {growth:+.2%}; {skipped} steps skipped.")
    assert abs(growth) < 0.02, watch.records
    for name in ("threads", "files", "traced"):
        assert last[name] <= first[name], (name, watch.records)
    print(f"{args.steps} steps: memory, threads, files and functions are flat.")


if __name__ == "__main__":
    app.run(main)
