r"""Times how long a lost worker keeps a training from going on.

    python -m benchmarks.cluster.restart

In each round a launcher starts two workers, of which one is killed after its
first epoch, and starts them again; once with `--standby`, and once without.
"""

import itertools
import json
import os
import pathlib
from statistics import median
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

# The moments in their order, and what takes the time before each.
_PARTS = {
    "started": "the loss is noticed, all workers are ended and started again",
    "imported": "Python, TensorFlow and Keras are imported",
    "met": "the strategy is created, all workers meet",
    "restored": "the model is built, the backup loaded",
    "stepped": "the first step: traced, compiled, taken",
}


def define_flags():
    flags.DEFINE_integer("rounds", 3, "Rounds.", lower_bound=1)
    flags.DEFINE_integer(
        "seconds", 30, "Seconds from the backup to the loss.", lower_bound=0
    )


def train(started, folder, seconds):
    """Trains as one worker, and writes down when what was done."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_regtopk

    moments = {"started": started, "imported": time.time()}
    strategy = tf_regtopk.MultiWorkerMirroredStrategy()
    moments["met"] = time.time()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                keras.layers.Conv2D(32, 3, activation="relu"),
                keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.01, momentum=0.9)
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    backup = tf_regtopk.Backup(folder / "backup")
    first_epoch = backup.restore(model)
    moments["restored"] = time.time()

    class Moments(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if "stepped" not in moments:
                moments["stepped"] = time.time()

        def on_epoch_begin(self, epoch, logs=None):
            if strategy.is_chief or epoch == 0 or first_epoch:
                return
            time.sleep(seconds)
            (folder / "killed").write_text(json.dumps(time.time()))
            os.kill(os.getpid(), 9)

    images = np.random.default_rng(0).standard_normal((256, 32, 32, 3))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    dataset = tf.data.Dataset.from_tensor_slices(
        (images.astype(np.float32), np.zeros(256, int))
    ).batch(64)
    model.fit(
        dataset.with_options(options),
        initial_epoch=first_epoch,
        epochs=2,
        verbose=0,
        callbacks=[backup, Moments()],
    )
    if strategy.is_chief:
        (folder / "moments").write_text(json.dumps(moments))


def launch(seconds, *options):
    """Seconds of each of `_PARTS`, with some options of the launcher."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        subprocess.run(
            [sys.executable, "-m", "tf_regtopk.run", "--device=cpu"]
            + ["--workers=2", "--max_restarts=1", "--show=none"]
            + [f"--log_dir={folder}/logs", *options]
            + [__file__, str(folder), str(seconds)],
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=600,
        )
        times = [json.loads((folder / "killed").read_text())]
        moments = json.loads((folder / "moments").read_text())
    times += [moments[part] for part in _PARTS]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    pairs = [
        (launch(args.seconds), launch(args.seconds, "--standby"))
        for _ in range(args.rounds)
    ]
    print(
        f"Two workers, {os.cpu_count()} cores, medians in seconds without and "
        "with --standby"
    )
    for i, text in enumerate(_PARTS.values()):
        print(
            *(
                f"{median(r[i] for r in way):5.1f}"
                for way in zip(*pairs, strict=True)
            ),
            text,
        )
    totals = [[sum(each) for each in way] for way in zip(*pairs, strict=True)]
    print(*(f"{median(way):5.1f}" for way in totals), "in all")
    print(*(f"{min(way):.1f} to {max(way):.1f}" for way in totals), sep=", ")
    ratios = [second / first for first, second in zip(*totals, strict=True)]
    print(
        f"With / without: {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    if "TF_CONFIG" in os.environ:  # A worker, started by `launch`.
        train(time.time(), pathlib.Path(sys.argv[1]), float(sys.argv[2]))
    else:
        define_flags()
        app.run(main)
