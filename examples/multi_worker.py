"""Trains on several workers, which may be lost and come back.

    python -m tf_regtopk.run --workers=2 examples/multi_worker.py

When a worker is lost, the same command goes on from the last backup, to the
bit as if nothing had happened. With another number of workers it goes on too.
`docs/cluster.md` has the commands for several hosts, Slurm and Kubernetes.
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


def define_flags():
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 64, "Images per step of all workers.", lower_bound=1
    )
    flags.DEFINE_integer(
        "worker_batch_size", None, "Images of each worker.", lower_bound=1
    )
    flags.DEFINE_integer("timeout_seconds", 60, "How long to wait for others.")
    flags.DEFINE_string("output_dir", "results/multi_worker", "Where files go.")
    example_utils.define_density_flag(0.01)
    example_utils.define_codec_flags()


def global_batches(x, y, batch_size, first_epoch):
    """Makes batches from an epoch on, of which each worker takes its part.

    The order of an epoch depends on its number alone. So the order is the same
    on every worker, and the same when training goes on after a break.
    """

    def images_of(epoch):
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(x)), seed=[0, epoch]
        )[: len(x) // batch_size * batch_size]
        return tf.data.Dataset.from_tensor_slices(
            (tf.gather(x, order), tf.gather(y, order))
        )

    options = tf.data.Options()
    options.autotune.enabled = False  # Its thread may end a minute late.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    epochs = tf.data.Dataset.counter(first_epoch)
    return epochs.flat_map(images_of).batch(batch_size).with_options(options)


def batch_size_and_learning_rate(num_replicas, args):
    """Returns the images of a step over all replicas, and the rate for them."""
    of_each = args.worker_batch_size or args.batch_size // num_replicas
    if not of_each:
        raise app.UsageError(
            f"`batch_size` must be at least {num_replicas}, an image for each "
            f"replica. Received: batch_size={args.batch_size}"
        )
    batch_size = of_each * num_replicas
    return batch_size, 0.02 * batch_size / 64


def train(strategy, data, args):
    """Trains from the last backup on. Returns the model and its backup."""
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        *data, test_size=0.2, random_state=0
    )
    num_replicas = strategy.num_replicas_in_sync
    batch_size, rate = batch_size_and_learning_rate(num_replicas, args)
    if batch_size > len(x_train):
        raise app.UsageError(
            f"A step must have at most the {len(x_train)} images that there "
            f"are. Received: {batch_size} images on {num_replicas} replicas"
        )
    print(
        f"{num_replicas} replicas, {batch_size} images per step, learning rate "
        f"{rate:g}"
    )
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
    optimizer.learning_rate = rate  # The backup may be of more workers.
    model.fit(
        global_batches(x_train, y_train, batch_size, first_epoch),
        validation_data=(x_test, y_test),
        validation_batch_size=batch_size,
        initial_epoch=first_epoch,
        epochs=args.epochs,
        steps_per_epoch=len(x_train) // batch_size,
        callbacks=[backup],
        shuffle=False,  # Done by the data set.
    )
    return model, backup


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    tf.get_logger().setLevel("WARNING")  # It would note every reduction.
    # Before the strategy, because nothing limits how long workers wait for
    # another one from there to the first weights.
    data = quickstart.load_digits()
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(
        timeout_seconds=args.timeout_seconds
    )
    model, backup = train(strategy, data, args)
    if strategy.is_chief:
        model.save(os.path.join(args.output_dir, "model.keras"))
    backup.delete()


if __name__ == "__main__":
    define_flags()
    app.run(main)
