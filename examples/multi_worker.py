r"""Trains a small convolutional network with several workers.

The workers share every global batch out among them, and send each other only
the gradient entries that RegTop-k selects. On one machine:

```
python -m tf_regtopk.run --workers=2 examples/multi_worker.py
```

`docs/cluster.md` has the commands for several hosts, Slurm and Kubernetes. When
a worker is lost, the same command goes on from the last backup of all workers,
to the bit as if nothing had happened; with another number of workers too.
"""

import json
import os

from absl import app
from absl import flags
import example_utils
import keras
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf

import tf_regtopk


def define_flags():
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size",
        64,
        "Images per step, over all workers; rounded down to a multiple of "
        "their number.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "worker_batch_size",
        None,
        "Images per step and worker, in place of --batch_size: with more "
        "workers a step takes more images, at a larger learning rate.",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "learning_rate",
        0.02,
        "Learning rate for --batch_size images per step.",
        lower_bound=0.0,
    )
    example_utils.define_density_flag(0.01)
    example_utils.define_codec_flags()
    flags.DEFINE_integer(
        "seed", 0, "Seed of the weights and of the order of the images."
    )
    flags.DEFINE_string(
        "output_dir", "results/multi_worker", "Where results and backups go."
    )
    flags.DEFINE_integer(
        "timeout_seconds",
        60,
        "How long a worker waits for the others in a step before it gives up.",
        lower_bound=1,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(example_utils)


def load_data():
    """Loads 1,797 images of digits, 8 x 8, that ship with scikit-learn.

    Returns:
        `(x_train, y_train), (x_test, y_test)`.
    """
    digits = sklearn.datasets.load_digits()
    x = (digits.images / 16.0).astype("float32")[..., None]
    y = digits.target.astype("int32")
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        x, y, test_size=0.2, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def make_training_dataset(x, y, batch_size, epochs, seed):
    """Makes global batches in an order that depends on seed and epoch alone.

    So the order is the same on every worker, whose parts of a batch do not
    overlap, and the same when training goes on after a break.
    """
    num_images = len(x) // batch_size * batch_size
    order = [
        np.random.default_rng([seed, epoch]).permutation(len(x))[:num_images]
        for epoch in epochs
    ]
    return make_dataset(x, y, batch_size, np.concatenate(order))


def make_dataset(x, y, batch_size, order):
    """Makes global batches, of which each worker takes its part."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return (
        tf.data.Dataset.from_tensor_slices(order)
        .batch(batch_size)
        .map(lambda indices: (tf.gather(x, indices), tf.gather(y, indices)))
        .with_options(options)
    )


def batch_size_and_learning_rate(num_workers, args):
    """The images of a step over all workers, and the learning rate for them."""
    if args.worker_batch_size:
        batch_size = args.worker_batch_size * num_workers
        return batch_size, args.learning_rate * batch_size / args.batch_size
    return args.batch_size // num_workers * num_workers, args.learning_rate


def build_model(args):
    """Builds and compiles the model. To be called in the strategy's scope."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate, momentum=0.9),
            sparsifier=tf_regtopk.RegTopK(density=args.density),
            codec=tf_regtopk.Codec(args.indices, args.values),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(strategy, data, args):
    """Trains from the last backup on. Returns model, backup and results."""
    (x_train, y_train), (x_test, y_test) = data
    keras.utils.set_random_seed(args.seed)
    with strategy.scope():
        model = build_model(args)
    backup = tf_regtopk.Backup(os.path.join(args.output_dir, "backup"))
    first_epoch = backup.restore(model)
    if first_epoch:
        print(f"Resuming after epoch {first_epoch}")
    num_workers = strategy.num_replicas_in_sync
    batch_size, rate = batch_size_and_learning_rate(num_workers, args)
    # The backup has that of as many workers as there were.
    model.optimizer.learning_rate = rate
    print(
        f"{num_workers} replicas, {batch_size} images per step, learning rate "
        f"{rate:g}"
    )
    test_dataset = make_dataset(
        x_test, y_test, batch_size, np.arange(len(x_test))
    )
    history = {}
    if first_epoch < args.epochs:
        epochs = range(first_epoch, args.epochs)
        history = model.fit(
            make_training_dataset(
                x_train, y_train, batch_size, epochs, args.seed
            ),
            validation_data=test_dataset,
            initial_epoch=first_epoch,
            epochs=args.epochs,
            steps_per_epoch=len(x_train) // batch_size,
            callbacks=[backup],
            shuffle=False,  # Done by the data set.
        ).history
    results = {
        "final": model.evaluate(test_dataset, verbose=0, return_dict=True),
        "first_epoch": first_epoch,
        "history": history,
        "num_replicas": strategy.num_replicas_in_sync,
    }
    return model, backup, results


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    # Before anything else of TensorFlow.
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(
        timeout_seconds=args.timeout_seconds
    )
    data = load_data()
    # The first weights are sent without a timeout, so that all workers meet
    # before, within that of the strategy.
    strategy.reduce("SUM", tf.constant(1.0), axis=None)
    model, backup, results = train(strategy, data, args)
    if strategy.is_chief:
        model.save(os.path.join(args.output_dir, "model.keras"))
        summary = {"config": example_utils.config(), **results}
        path = os.path.join(args.output_dir, "summary.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
        print(
            f"Accuracy on the test images: {results['final']['accuracy']:.3f}"
        )
    backup.delete()


if __name__ == "__main__":
    define_flags()
    app.run(main)
