"""Trains on several workers, which may be lost and come back.

The workers share every global batch out among them, and send each other only
the gradient entries that RegTop-k selects. On one machine:

    python -m tf_regtopk.run --workers=2 examples/multi_worker.py

`docs/cluster.md` has the commands for several hosts, Slurm and Kubernetes. When
a worker is lost, the same command goes on from the last backup of all workers,
to the bit as if nothing had happened; with another number of workers too.
"""

import os

from absl import app
from absl import flags
import example_utils
import keras
import quickstart
import sklearn.model_selection
import tensorflow as tf

import tf_regtopk

LEARNING_RATE = 0.02  # For `--batch_size` images per step.


def define_flags():
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size",
        64,
        "Images per step of all workers, rounded down to a multiple of them.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "worker_batch_size",
        None,
        "Images per step of each worker, and the learning rate to match.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "output_dir", "results/multi_worker", "Where results and backups go."
    )
    flags.DEFINE_integer(
        "timeout_seconds", 60, "Seconds that a worker waits for the others."
    )
    example_utils.define_density_flag(0.01)
    example_utils.define_codec_flags()


def load_data():
    """Loads images of digits: `x_train, x_test, y_train, y_test`."""
    return sklearn.model_selection.train_test_split(
        *quickstart.load_digits(), test_size=0.2, random_state=0
    )


def global_batches(x, y, batch_size, first_epoch):
    """Makes batches from an epoch on, of which each worker takes its part.

    The order of an epoch depends on its number alone. So the order is the same
    on every worker, and the same when training goes on after a break.
    """

    def images_of(epoch):
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(x)), seed=[0, epoch]
        )
        order = order[: len(x) // batch_size * batch_size]
        return tf.data.Dataset.from_tensor_slices(
            (tf.gather(x, order), tf.gather(y, order))
        )

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    epochs = tf.data.Dataset.counter(first_epoch)
    return epochs.flat_map(images_of).batch(batch_size).with_options(options)


def batch_size_and_learning_rate(num_workers, args):
    """Returns the images of a step over all workers, and the rate for them."""
    if args.worker_batch_size:
        batch_size = args.worker_batch_size * num_workers
        return batch_size, LEARNING_RATE * batch_size / args.batch_size
    return args.batch_size // num_workers * num_workers, LEARNING_RATE


def train(strategy, data, args):
    """Trains from the last backup on. Returns model, backup and results."""
    x_train, x_test, y_train, y_test = data
    num_workers = strategy.num_replicas_in_sync
    batch_size, rate = batch_size_and_learning_rate(num_workers, args)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(rate, momentum=0.9),
            sparsifier=tf_regtopk.RegTopK(density=args.density),
            codec=tf_regtopk.Codec(args.indices, args.values),
        )
        model = quickstart.build_model(optimizer)
    backup = tf_regtopk.Backup(os.path.join(args.output_dir, "backup"))
    first_epoch = backup.restore(model)
    # The backup has the rate of as many workers as there were.
    optimizer.learning_rate = rate
    if first_epoch:
        print(f"Resuming after epoch {first_epoch}")
    print(
        f"{num_workers} replicas, {batch_size} images per step, learning rate "
        f"{rate:g}"
    )
    history = model.fit(
        global_batches(x_train, y_train, batch_size, first_epoch),
        validation_data=(x_test, y_test),
        validation_batch_size=batch_size,
        initial_epoch=first_epoch,
        epochs=args.epochs,
        steps_per_epoch=len(x_train) // batch_size,
        callbacks=[backup],
        shuffle=False,  # Done by the data set.
    ).history
    results = {
        "final": model.evaluate(
            x_test, y_test, batch_size=batch_size, verbose=0, return_dict=True
        ),
        "first_epoch": first_epoch,
        "history": history,
        "num_replicas": num_workers,
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
    # The workers meet here, because they would wait for each other without a
    # limit where the first weights are sent.
    strategy.reduce("SUM", tf.constant(1.0), axis=None)
    model, backup, results = train(strategy, data, args)
    if strategy.is_chief:
        model.save(os.path.join(args.output_dir, "model.keras"))
        summary = {"config": example_utils.config(), **results}
        example_utils.save_summary(args.output_dir, summary)
        accuracy = results["final"]["accuracy"]
        print(f"Accuracy on the test images: {accuracy:.3f}")
    backup.delete()


if __name__ == "__main__":
    define_flags()
    app.run(main)
