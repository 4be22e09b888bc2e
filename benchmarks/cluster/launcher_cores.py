r"""Times a step of workers on the CPU, with shares of the cores and with all.

    python -m benchmarks.cluster.launcher_cores

In each round the launcher starts the workers once in each way, on this machine
alone: `--cores=share`, `--cores=all`, and all cores with one thread for each
operation.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

_WAYS = {
    "share": (["--cores=share"], {}),
    "all": (["--cores=all"], {}),
    "all, 1 thread": (["--cores=all"], {"TF_NUM_INTRAOP_THREADS": "1"}),
}
_STEPS = 25
_EPOCHS = 5


def define_flags():
    flags.DEFINE_integer("num_workers", 2, "Workers.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds.", lower_bound=1)
    flags.DEFINE_enum(
        "model", "convolutions", ["convolutions", "dense"], "What is trained."
    )


def train(model_name, result_path):
    """Trains as one worker, and writes the milliseconds of a step."""
    import tf_regtopk

    strategy = tf_regtopk.MultiWorkerMirroredStrategy()
    import keras
    import numpy as np
    import tensorflow as tf

    hidden = {
        "convolutions": [
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
        ],
        "dense": [
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
        ],
    }[model_name]
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), *hidden, keras.layers.Dense(10)]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.01)
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((64 * _STEPS, 32, 32, 3)).astype(np.float32)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    dataset = tf.data.Dataset.from_tensor_slices(
        (images, np.zeros(len(images), int))
    ).batch(64)

    class Timer(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.milliseconds = []

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                self._since = time.perf_counter()
            if batch == _STEPS - 1:
                seconds = time.perf_counter() - self._since
                self.milliseconds.append(1000 * seconds / (_STEPS - 3))

    timer = Timer()
    model.fit(
        dataset.with_options(options),
        epochs=_EPOCHS,
        verbose=0,
        callbacks=[timer],
    )
    if strategy.cluster_resolver.task_id == 0:
        # The first epoch warms up.
        median = statistics.median(timer.milliseconds[1:])
        pathlib.Path(result_path).write_text(json.dumps(median))


def launch(way, args):
    """Milliseconds of a step of all workers, started in one of `_WAYS`."""
    options, environ = _WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result")
        subprocess.run(
            [sys.executable, "-m", "tf_regtopk.run", "--device=cpu"]
            + [f"--workers={args.num_workers}", "--show=none", *options]
            + [f"--log_dir={folder}/logs", __file__, args.model, str(result)],
            env={**os.environ, **environ},
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=600,
        )
        return json.loads(result.read_text())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    found = {way: [] for way in _WAYS}
    for _ in range(args.rounds):
        for way, times in found.items():
            times.append(launch(way, args))
    base = statistics.median(found["share"])
    print(f"{args.num_workers} workers, {os.cpu_count()} cores, {args.model}")
    for way, times in found.items():
        median = statistics.median(times)
        print(
            f"{way:14} {median:6.1f} ms a step ({min(times):.1f} to "
            f"{max(times):.1f}), {median / base:.2f} times the shares'"
        )


if __name__ == "__main__":
    if "TF_CONFIG" in os.environ:  # A worker, started by `launch`.
        train(*sys.argv[1:])
    else:
        define_flags()
        app.run(main)
