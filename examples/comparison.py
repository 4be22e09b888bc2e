"""Methods compared on one task: tuned alike, over seeds, kept on disk."""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
from typing import Any

from absl import flags
import example_utils
import keras
import numpy as np
import tensorflow as tf
import tqdm
import worker_data

import tf_regtopk

# Flags that say which runs there are, and nothing about each.
_NOT_OF_A_RUN = (
    "data_dir",
    "learning_rates",
    "methods",
    "output_dir",
    "seeds",
    "tuning_seed",
)
# What most comparisons lack: the same without error feedback, and others'
# answers to its weakness.
_METHODS = (
    "dense",
    "topk_no_feedback",
    "topk",
    "regtopk",
    "dgc",
    "ef21",
    "shift_regtopk",
)
# What the others are compared with.
_BASELINE = "topk"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        build_model: Function that returns a Keras model with logits.
        train: `(images, labels)`, arrays.
        test: Likewise.
        num_held_out: Number of training images, the last ones, on which
            learning rates are compared.
    """

    build_model: Callable[[], Any]
    train: tuple
    test: tuple
    num_held_out: int


def define_flags(output_dir, learning_rates, batch_size, rounds):
    """Defines the flags of a comparison; the arguments are defaults."""
    flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps it.")
    worker_data.define_flags()
    flags.DEFINE_integer("num_workers", 8, "Number of workers.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", batch_size, "Images a worker and step.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", rounds, "Number of steps.", lower_bound=1)
    flags.DEFINE_integer(
        "evaluate_every", 250, "Steps between tests.", lower_bound=1
    )
    flags.DEFINE_list(
        "learning_rates",
        [str(rate) for rate in learning_rates],
        "Learning rates, of which each method takes the one that suits it "
        "best on images held out.",
    )
    flags.DEFINE_float(
        "momentum", 0.9, "Momentum.", lower_bound=0.0, upper_bound=0.999
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds of weights, shards and batches.")
    flags.DEFINE_integer(
        "tuning_seed", 1000, "Seed of the runs that learning rates are from."
    )
    example_utils.define_density_flag(0.001)
    example_utils.define_method_flags(mu=4.0, methods=_METHODS)
    flags.DEFINE_string("output_dir", output_dir, "Where the results go.")


def run(task, strategy, args):
    """Runs what has not been run yet.

    Returns:
        Method to a dictionary of its learning rate, its tuning runs, and its
        runs by seed.
    """
    # One copy for all runs.
    images, labels = task.train
    task = dataclasses.replace(task, train=(tf.constant(images), labels))
    rates = [float(rate) for rate in args.learning_rates]
    seeds = [int(seed) for seed in args.seeds]

    def run_once(method, rate, seed, is_tuning):
        setting = {"method": method, "learning_rate": rate, "seed": seed}
        return _cached(
            {"is_tuning": is_tuning, **setting},
            args,
            lambda: train(task, strategy, args, is_tuning, **setting),
        )

    results = {}
    for method in args.methods:
        tuning = {}
        if len(rates) > 1:
            tuning = {
                rate: run_once(method, rate, args.tuning_seed, True)
                for rate in rates
            }
        rate = rates[0]
        if tuning:
            rate = max(rates, key=lambda rate: tuning[rate]["accuracy"][-1])
        results[method] = {
            "learning_rate": rate,
            "tuning": {
                str(r): run["accuracy"][-1] for r, run in tuning.items()
            },
            "runs": {},
        }
    for seed in seeds:
        for method, result in results.items():
            result["runs"][str(seed)] = run_once(
                method, result["learning_rate"], seed, False
            )
    return results


def train(task, strategy, args, is_tuning, method, learning_rate, seed):
    """One run, from weights and on batches that depend on the seed alone.

    Returns:
        Dictionary of lists: `round` and `accuracy`; and the bytes that a worker
        sends a step.
    """
    images, labels = task.train
    held_out = len(labels) - task.num_held_out
    parts = worker_data.shards(
        labels[:held_out],
        args.num_workers,
        args.split,
        args.shard_sizes,
        args.batch_size,
        seed,
    )
    numbers = worker_data.batches(parts, args.batch_size, args.rounds, seed)
    test = task.test
    if is_tuning:
        test = images[held_out:], labels[held_out:]

    keras.backend.clear_session()  # The run before is not needed any more.
    keras.utils.set_random_seed(seed)
    start = task.build_model()
    with strategy.scope():
        model = task.build_model()
        optimizer = example_utils.make_optimizer(
            method, args, learning_rate, args.density, args.momentum
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
    if isinstance(optimizer, tf_regtopk.SparsifiedOptimizer):
        return optimizer.wire_report().sent_bytes
    size = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    return round(2 * (num_workers - 1) / num_workers * 4 * size)


def report(results, args, title):
    """Prints a table, and writes the summary and the figure."""
    print(f"\n{title}, {args.rounds} rounds, seeds {', '.join(args.seeds)}")
    print(
        f"{'method':20} {'rate':>6} {'bytes/step':>10} {'accuracy':>8} "
        f"{'std':>6}  {'against ' + _BASELINE:>15}"
    )
    summary = {}
    for method, result in results.items():
        runs = list(result["runs"].values())
        final = np.array([run["accuracy"][-1] for run in runs])
        summary[method] = {
            **result,
            "accuracy": float(final.mean()),
            "accuracy_std": _std(final),
        }
        print(
            f"{method:20} {result['learning_rate']:6g} "
            f"{runs[0]['bytes_a_step']:10,} {final.mean():8.4f} "
            f"{_std(final):6.4f}  {_difference(results, method)}"
        )

    def draw(by_step, by_bytes):
        for method, result in results.items():
            runs = list(result["runs"].values())
            curves = np.array([run["accuracy"] for run in runs])
            rounds = np.array(runs[0]["round"])
            megabytes = rounds * runs[0]["bytes_a_step"] / 1e6
            for axes, x in ((by_step, rounds), (by_bytes, megabytes)):
                [line] = axes.plot(x, curves.mean(axis=0), label=method)
                axes.fill_between(
                    x,
                    curves.min(axis=0),
                    curves.max(axis=0),
                    color=line.get_color(),
                    alpha=0.15,
                    linewidth=0,
                )
        by_step.set_xlabel("step")
        by_step.set_ylabel("test accuracy")
        by_step.legend()
        by_step.set_title(title)
        by_bytes.set_xlabel("megabytes sent by a worker")
        by_bytes.set_xscale("log")

    example_utils.save_results(
        args.output_dir,
        {"config": example_utils.config(), "methods": summary},
        draw,
        num_plots=2,
    )


def _difference(results, method):
    """Mean and standard error over seeds of the gain over Top-k, in text."""
    if method == _BASELINE or _BASELINE not in results:
        return ""
    baseline = results[_BASELINE]["runs"]
    gains = np.array(
        [
            run["accuracy"][-1] - baseline[seed]["accuracy"][-1]
            for seed, run in results[method]["runs"].items()
        ]
    )
    error = _std(gains) / len(gains) ** 0.5
    return f"{gains.mean():+.4f} +- {error:.4f}"


def _std(values):
    """The standard deviation of what the values are a sample of."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _cached(setting, args, compute):
    """The result of a run, from disk if it is there."""
    shared = {
        name: value
        for name, value in example_utils.config().items()
        if name not in _NOT_OF_A_RUN
    }
    text = json.dumps({**shared, **setting}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = os.path.join(args.output_dir, "runs")
    path = os.path.join(folder, f"{name}.json")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)["result"]
    except FileNotFoundError:
        result = compute()
    os.makedirs(folder, exist_ok=True)
    record = {"setting": {**shared, **setting}, "result": result}
    # Whole or not at all, if it is stopped now.
    part = f"{path}.{os.getpid()}"
    with open(part, "w", encoding="utf-8") as f:
        json.dump(record, f, indent=2)
    os.replace(part, path)
    return result
