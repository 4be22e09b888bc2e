r"""How often the sampled bound fails in a real training run.

Trains a convolutional network on CIFAR-10 with RegTop-k and two workers, and
counts the selections for which the candidates above the sampled bound are too
few or too many, so that all scores are searched.

    python -m benchmarks.kernels.fallback_rate --data_dir=~/tensorflow_datasets
"""

import json
import os

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm

import tf_regtopk
from tf_regtopk import selection
from tf_regtopk.error_feedback import equations
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.steps import flat_buffer


def define_flags():
    flags.DEFINE_string("data_dir", None, "Where the data sets of tfds lie.")
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_integer("steps", 500, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 2, "Number of workers.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Of each worker.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.05, "With a momentum of 0.9.")
    flags.DEFINE_integer("seed", 0, "Seed of weights and batches.")
    flags.DEFINE_string("output_dir", "results/fallback_rate", "For results.")


def make_model():
    layers = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(512, activation="relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers)


class Worker:
    """Selects as a replica does, and notes whether the sample sufficed."""

    def __init__(self, sparsifier, size):
        self.group = selection.Group(size, sparsifier.num_selected(size))
        self.sparsifier = sparsifier
        self.error = tf.zeros([size])
        self.memory = sparsifier.initial_memory(
            self.group.k, self.group.size, tf.float32
        )

    @tf.function(jit_compile=True, autograph=False)
    def _select(self, g, error, memory, step):
        a = equations.accumulate(error, g)
        scores = self.sparsifier.score(a, memory, step)
        suffices = selection.sample_suffices(scores, [self.group], step)
        indices = selection.select_largest(scores, [self.group], step)
        sent = tf.gather(a, indices)
        error = equations.residual_error(a, indices, sent)
        return indices, sent, error, suffices

    def select(self, g, step):
        self.indices, self.sent, self.error, suffices = self._select(
            g, self.error, self.memory, tf.constant(step)
        )
        return not suffices

    def remember(self, total):
        self.memory = self.sparsifier.remember(
            self.memory,
            self.indices,
            self.sent,
            tf.gather(total, self.indices),
            tf.constant(0, tf.int64),
        )


def train(sparsifier, images, labels):
    """Trains, and returns `(J, number of fallbacks, mean loss at the end)`."""
    args = flags.FLAGS
    keras.utils.set_random_seed(args.seed)
    model = make_model()
    optimizer = keras.optimizers.SGD(args.learning_rate, momentum=0.9)
    optimizer.build(model.trainable_variables)
    buffer = flat_buffer.FlatBuffer.for_variables(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(autograph=False)
    def gradient(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        flat = tf.concat(buffer.vectors(gradients), axis=0)
        return loss, flat / args.num_workers

    rng = np.random.default_rng(args.seed)
    workers = [Worker(sparsifier, buffer.size) for _ in range(args.num_workers)]
    num_fallbacks, losses = 0, []
    for step in tqdm.trange(args.steps, desc=str(sparsifier.density)):
        for n, worker in enumerate(workers):
            # Each worker has its own part of the data.
            batch = rng.integers(
                len(labels) // args.num_workers, size=args.batch_size
            )
            batch = batch * args.num_workers + n
            loss, g = gradient(images[batch], labels[batch])
            losses.append(float(loss))
            num_fallbacks += worker.select(g, step)
        total = scatter_sum.sum_entries(
            tf.stack([worker.indices for worker in workers]),
            tf.stack([worker.sent for worker in workers]),
            buffer.size,
        )
        for worker in workers:
            worker.remember(total)
        optimizer.apply(buffer.split(total), model.trainable_variables)
    return buffer.size, num_fallbacks, float(np.mean(losses[-50:]))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    images, labels = tfds.as_numpy(
        tfds.load(
            "cifar10",
            split="train",
            batch_size=-1,
            as_supervised=True,
            data_dir=args.data_dir and os.path.expanduser(args.data_dir),
        )
    )
    images = (images / 255.0).astype(np.float32)
    results = []
    for density in map(float, args.densities):
        sparsifier = tf_regtopk.RegTopK(density)
        size, num_fallbacks, loss = train(sparsifier, images, labels)
        num_selections = args.steps * args.num_workers
        results.append(
            {
                "size": size,
                "density": density,
                "selections": num_selections,
                "fallbacks": num_fallbacks,
                "final_loss": loss,
            }
        )
        print(
            f"J={size} density={density:g}: {num_fallbacks} of "
            f"{num_selections} selections fell back; loss {loss:.3f}"
        )
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"results": results}, f, indent=2)
    print(f"Wrote {path}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
