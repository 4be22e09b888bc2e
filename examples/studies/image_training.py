"""Trains a Keras model on images with simulated workers."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tqdm

import tf_regtopk

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import methods
import worker_data


def compare(train_data, test_data, build_model, held_out, strategy, args):
    """Compares the methods, and writes the report.

    Args:
        train_data: `(images, labels)`, arrays.
        test_data: Likewise.
        build_model: Function that returns a Keras model with logits.
        held_out: Number of training images, the last ones, on which learning
            rates are compared; at most a tenth of all.
        strategy: The strategy to train under, one replica a worker.
        args: The flags.
    """
    images, labels = train_data
    task = Task(
        build_model,
        tf.constant(images),  # One for all runs.
        labels,
        test_data,
        min(held_out, len(labels) // 10),
    )
    comparison.report(
        comparison.run(functools.partial(train, task, strategy, args), args),
        args,
        f"{args.model}, {args.num_workers} workers, "
        f"{worker_data.describe(args)}, density {args.density:g}",
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, as of `compare`."""

    build_model: Callable[[], Any]
    images: tf.Tensor
    labels: np.ndarray
    test: tuple
    held_out: int
    # By which images are shared out; the labels, if None.
    classes: np.ndarray | None = None

    @property
    def classes_to_train_on(self):
        """The class of each image that is not held out."""
        classes = self.labels if self.classes is None else self.classes
        return classes[: len(classes) - self.held_out]


def train(task, strategy, args, is_tuning, method, learning_rate, seed):
    """One run, from weights and on batches that depend on the seed alone.

    Returns:
        Dictionary of lists: `round` and `accuracy`; and the bytes that a worker
        sends a step.
    """
    images, labels = task.images, task.labels
    held_out = len(labels) - task.held_out
    numbers = numbers_of(task.classes_to_train_on, args, seed, args.rounds)
    test = task.test
    if is_tuning:
        test = images[held_out:], labels[held_out:]

    keras.backend.clear_session()  # The run before is not needed any more.
    keras.utils.set_random_seed(seed)
    start = task.build_model()
    with strategy.scope():
        model = task.build_model()
        optimizer = methods.make_optimizer(
            method,
            args,
            learning_rate,
            args.density,
            args.momentum,
            adam=args.inner_optimizer == "adam",
        )
        model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        optimizer.build(model.trainable_variables)
    model.set_weights(start.get_weights())
    tester = Tester(start, test, args, f"{method}, {learning_rate:g}, {seed}")
    model.fit(
        worker_data.global_batches(images, labels, numbers),
        callbacks=[tester],
        shuffle=False,
        verbose=0,
    )
    return {
        "round": tester.rounds,
        "accuracy": tester.accuracies,
        "bytes_a_step": bytes_a_step(optimizer, model, args.num_workers),
    }


def numbers_of(classes, args, seed, num_steps):
    """The images in every batch of a run, as of `worker_data.batches`."""
    parts = worker_data.shards(
        classes,
        args.num_workers,
        args.split,
        args.shard_sizes,
        args.batch_size,
        seed,
    )
    return worker_data.batches(parts, args.batch_size, num_steps, seed)


class Tester(keras.callbacks.Callback):
    """Tests the model every now and then, and shows a progress bar."""

    def __init__(self, model, data, args, title):
        super().__init__()
        self._copy, self._data, self._args = model, data, args
        self._predict = tf.function(
            lambda images: tf.argmax(model(images, training=False), axis=-1)
        )
        self._title = title
        self.rounds, self.accuracies = [], []

    def on_train_begin(self, logs=None):
        self._bar = tqdm.tqdm(total=self._args.rounds, desc=self._title)

    def on_train_batch_end(self, batch, logs=None):
        self._bar.update()
        number = batch + 1
        if number % self._args.evaluate_every and number < self._args.rounds:
            return
        self._copy.set_weights(self.model.get_weights())
        images, labels = self._data
        predicted = [
            self._predict(tf.constant(images[i : i + 500])).numpy()
            for i in range(0, len(images), 500)
        ]
        self.rounds.append(number)
        self.accuracies.append(
            float(np.mean(np.concatenate(predicted) == labels))
        )

    def on_train_end(self, logs=None):
        self._bar.close()


def bytes_a_step(optimizer, model, num_workers):
    """Bytes that each worker sends a step, in rings."""
    cluster = tf_regtopk.Cluster(num_workers)
    payload_bytes = 0
    dense_bytes = sum(
        4 * int(np.prod(v.shape)) for v in model.trainable_variables
    )
    if isinstance(optimizer, tf_regtopk.SparsifiedOptimizer):
        report = optimizer.wire_report()
        payload_bytes = report.payload_bytes
        dense_bytes = report.dense_below_bytes
    return round(
        tf_regtopk.AllGather().sent_bytes(payload_bytes, cluster)
        + tf_regtopk.AllReduce().sent_bytes(dense_bytes, cluster)
    )
