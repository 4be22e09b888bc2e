r"""Digits: methods compared over many seeds, in seconds a run.

A small network learns 1,797 images of digits, all workers in one compiled
program. Learning rates are compared, and runs kept, as in `cifar10_resnet.py`.

    python examples/studies/digits_study.py --split=by_label --density=0.001

Source: the images ship with scikit-learn.
"""

import functools
import itertools
import pathlib
import sys

from absl import app
from absl import flags
import numpy as np
import sklearn.model_selection
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import methods
import powersgd
import quickstart
import worker_data

# Of the network: pixels, hidden units, classes.
LAYERS = (64, 64, 10)
HELD_OUT = 360  # As many as there are to test on.


def define_flags():
    comparison.define_flags(
        output_dir="results/digits_study",
        learning_rates=(0.01, 0.02, 0.05, 0.1, 0.2),
        batch_size=20,
        rounds=1500,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(comparison)


def logits(weights, images):
    """The network's, for one set of weights a worker.

    Args:
        weights: Float tensor `[N, J]`.
        images: Float tensor `[N, batch, pixels]`.

    Returns:
        Float tensor `[N, batch, classes]`.
    """
    x, start = images, 0
    for inputs, outputs in itertools.pairwise(LAYERS):
        if start:
            x = tf.nn.relu(x)
        kernel = weights[:, start : start + inputs * outputs]
        start += inputs * outputs
        bias = weights[:, start : start + outputs]
        start += outputs
        kernel = tf.reshape(kernel, [-1, inputs, outputs])
        x = tf.einsum("nbi,nio->nbo", x, kernel) + bias[:, tf.newaxis]
    return x


def start_weights(seed):
    """Random weights `[J]` of the scale that suits ReLU."""
    rng = np.random.default_rng(seed)
    parts = []
    for inputs, outputs in itertools.pairwise(LAYERS):
        scale = np.sqrt(2 / inputs)
        parts += [scale * rng.standard_normal(inputs * outputs)]
        parts += [np.zeros(outputs)]
    return tf.constant(np.concatenate(parts), tf.float32)


def gradients_of(weights, data, step):
    """The gradient `[N, J]` of each worker's loss on its batch.

    Args:
        weights: Float tensor `[J]`, or `[N, J]`, those of each worker.
        data: As of `data_of`.
        step: The number of the step.
    """
    images, labels, *_ = data
    images, labels = images[step], labels[step]
    copies = tf.broadcast_to(weights, [labels.shape[0], weights.shape[-1]])
    with tf.GradientTape() as tape:
        tape.watch(copies)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, logits(copies, images)
        )
        loss = tf.reduce_sum(tf.reduce_mean(losses, axis=1))
    return tape.gradient(loss, copies)


def accuracy(weights, data):
    *_, images, labels = data
    predicted = tf.argmax(
        logits(weights[tf.newaxis], images[tf.newaxis])[0],
        axis=-1,
        output_type=tf.int32,
    )
    return tf.reduce_mean(tf.cast(predicted == labels, tf.float32))


def data_of(args, is_tuning, seed):
    """Loads the batches of all steps, and the images to test on.

    Args:
        args: The flags.
        is_tuning: Whether to test on training images held out.
        seed: Integer, that of the shards and of the batches.

    Returns:
        `(images, labels, test images, test labels)`: NumPy arrays
        `[rounds, N, batch, pixels]`, `[rounds, N, batch]`,
        `[HELD_OUT, pixels]`, `[HELD_OUT]`.
    """
    images, digits = quickstart.load_digits()
    x, x_test, y, y_test = sklearn.model_selection.train_test_split(
        images, digits.astype("int32"), test_size=HELD_OUT, random_state=0
    )
    test = (x_test, y_test)
    if is_tuning:
        test = x[-HELD_OUT:], y[-HELD_OUT:]
    x, y = x[:-HELD_OUT], y[:-HELD_OUT]
    parts = worker_data.shards(
        y,
        args.num_workers,
        args.split,
        args.shard_sizes,
        args.batch_size,
        seed,
    )
    numbers = worker_data.batches(parts, args.batch_size, args.rounds, seed)
    return x[numbers], y[numbers], *test


def sent_bytes(descent, args):
    """The bytes that a worker would send per step.

    Args:
        descent: What `simulation.descent_of` returns.
        args: The flags.
    """
    num_entries = sum((i + 1) * o for i, o in itertools.pairwise(LAYERS))
    if isinstance(descent, simulation.DenseDescent):
        return tf_regtopk.AllReduce().sent_bytes(
            4 * num_entries, tf_regtopk.Cluster(args.num_workers)
        )
    return descent.sent_bytes(num_entries)


def train(args, trainings, is_tuning, method, learning_rate, seed):
    """One run, from weights and on batches that depend on the seed alone."""
    images, labels, *test = data_of(args, is_tuning, seed)
    weights = start_weights(seed)
    is_adam = args.inner_optimizer == "adam"
    optimizer = methods.make_optimizer(
        method, args, learning_rate, args.density, args.momentum, is_adam
    )
    shapes = [
        shape
        for inputs, outputs in itertools.pairwise(LAYERS)
        for shape in ((inputs, outputs), (outputs,))
    ]
    descent = powersgd.descent_of(optimizer, args.num_workers, shapes)
    if method not in trainings:  # Compiled once for all seeds.
        trainings[method] = simulation.gradient_descent(
            descent,
            gradients_of,
            accuracy,
            args.rounds,
        )
    data = tuple(tf.constant(part) for part in (images, labels, *test))
    rate = float(optimizer.learning_rate)
    curve = trainings[method](weights, rate, data).numpy()
    every = args.evaluate_every
    rounds = sorted({*range(every, args.rounds, every), args.rounds})
    return {
        "round": rounds,
        "accuracy": [float(curve[round - 1]) for round in rounds],
        "bytes_a_step": round(sent_bytes(descent, args)),
    }


def run_study(argv, train):
    """Runs and reports what the flags name.

    Args:
        argv: The arguments that are no flags, of which there must be none.
        train: Function of the flags, of a dictionary that keeps what it has
            compiled, and of what `comparison.run` gives.
    """
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    # It would warn of a program for each method.
    tf.get_logger().setLevel("ERROR")
    results = comparison.run(functools.partial(train, args, {}), args)
    comparison.report(
        results,
        args,
        f"digits, {args.num_workers} workers, {worker_data.describe(args)}, "
        f"density {args.density:g}",
    )


def main(argv):
    run_study(argv, train)


if __name__ == "__main__":
    define_flags()
    app.run(main)
