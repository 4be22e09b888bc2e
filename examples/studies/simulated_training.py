"""Trains a model on images with workers in one process, for many steps.

The gradients are TensorFlow's, one worker after the other, and all the rest of
a step is one compiled program, with the step of the library in it. A run uses
one core, goes on where it was stopped, and may have others beside it.
"""

import functools
import json
import math
import os
import pathlib

from absl import flags
import comparison
import image_training
import keras
import numpy as np
import tensorflow as tf
import tqdm
import training_programs
import worker_data

from tf_regtopk.kernels import tracing
from tf_regtopk.sizes import density_decay

# Steps between two files of a run, and between two measurements of a step.
_SAVE_EVERY = 500
_MEASURE_EVERY = 100
_NUM_PREDICTED = 500


def define_flags(output_dir, learning_rates, batch_size):
    """Defines the flags of a study; the arguments are defaults."""
    comparison.define_flags(output_dir, learning_rates, batch_size, rounds=6000)
    flags.DEFINE_integer(
        "tuning_rounds",
        2000,
        "Number of steps with which learning rates are compared.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "schedule", "cosine", ["cosine", "constant"], "Of the learning rate."
    )
    flags.DEFINE_float(
        "warm_up",
        0.05,
        "Share of the steps in which the learning rate rises.",
        lower_bound=0.0,
        upper_bound=0.5,
    )
    flags.DEFINE_integer(
        "density_phases",
        1,
        "In how many parts of the steps the density follows the learning rate, "
        "as of DensityDecay. --density is the mean.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "look_ahead",
        "none",
        ["none", *training_programs.LOOK_AHEAD],
        "Take each worker's gradient at the weights that there would be if the "
        "residual errors of all had been sent, which no worker could know; or "
        "its own, as if those of the others were the same.",
    )
    # So that who adopts these flags adopts those too.
    flags.adopt_module_key_flags(comparison)


def compare(task, args, name):
    """Compares the methods, and writes the report.

    Args:
        task: `image_training.Task`.
        args: The flags.
        name: Of the network.
    """
    comparison.report(
        comparison.run(functools.partial(train, task, args), args),
        args,
        f"{name}, {args.num_workers} workers, {worker_data.describe(args)}, "
        f"density {args.density:g}",
    )


def use_one_core():
    """Keeps TensorFlow to one thread, before it is used."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def learning_rate_at(step, num_steps, peak, warm_up, schedule):
    """The learning rate of a step: a linear rise, then a cosine, or neither.

    Args:
        step: Number of steps taken before.
        num_steps: Number of all steps.
        peak: The largest learning rate.
        warm_up: Share of the steps in which it rises.
        schedule: "cosine", which ends at 0, or "constant".

    Returns:
        Float.

    Example:

    >>> [round(learning_rate_at(t, 8, 1.0, 0.25, "cosine"), 3)
    ...  for t in range(8)]
    [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    num_rising = round(warm_up * num_steps)
    if step < num_rising:
        return peak * (step + 1) / num_rising
    if schedule == "constant":
        return peak
    progress = (step - num_rising) / (num_steps - num_rising)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def _densities(num_steps, args):
    """The density of each step, by `--density_phases`."""
    if args.density_phases == 1:
        return [args.density] * num_steps
    rates = [
        learning_rate_at(t, num_steps, 1.0, args.warm_up, args.schedule)
        for t in range(num_steps)
    ]
    return density_decay.densities(rates, args.density, args.density_phases)


def train(task, args, is_tuning, method, learning_rate, seed):
    """One run, as of `image_training.train`, without a strategy.

    Args:
        task: `image_training.Task`.
        args: The flags.
        is_tuning: Whether to test on training images held out, after
            `args.tuning_rounds` steps.
        method: As of `methods.make_optimizer`, and so the next two.
        learning_rate: See above; the largest of the schedule.
        seed: Integer, that of the weights and of the batches.

    Returns:
        Dictionary of lists: `round` and `accuracy`; of `bytes_a_step`; and,
        for a sparse method, of `telemetry`: a list of dictionaries of numbers,
        a `step` among them.
    """
    num_steps = args.tuning_rounds if is_tuning else args.rounds
    images, labels = task.images.numpy(), task.labels
    held_out = len(labels) - task.held_out
    test = (images[held_out:], labels[held_out:]) if is_tuning else task.test
    numbers = image_training.numbers_of(
        task.classes_to_train_on, args, seed, num_steps
    )

    keras.backend.clear_session()  # The run before is not needed any more.
    keras.utils.set_random_seed(seed)
    model = task.build_model()
    densities = _densities(num_steps, args)
    weights = tf.concat(
        [tf.reshape(v, [-1]) for v in model.trainable_variables], axis=0
    )
    record = {"round": [], "accuracy": [], "telemetry": []}
    path = pathlib.Path(
        args.output_dir,
        f"unfinished_{_file_name(method)}_{learning_rate:g}_{seed}_{num_steps}"
        f"_{'tuning' if is_tuning else 'test'}.npz",
    )
    first = 0
    if path.exists():
        first, arrays, record = _load(path)
    run = _Run(model, method, args, densities[max(first - 1, 0)])
    if not first:
        arrays = run.start(weights)
    title = f"{method}, {learning_rate:g}, {seed}"
    for t in tqdm.trange(
        first,
        num_steps,
        desc=title,
        initial=first,
        total=num_steps,
        disable=None,
        mininterval=1,
    ):
        rate = learning_rate_at(
            t, num_steps, learning_rate, args.warm_up, args.schedule
        )
        if run.is_sparse and densities[t] != run.density:
            run = _Run(model, method, args, densities[t])
            arrays = run.go_on(arrays)
        gradients = run.gradients(
            rate, arrays, images[numbers[t]], labels[numbers[t]]
        )
        if run.is_sparse and t % _MEASURE_EVERY == _MEASURE_EVERY - 1:
            found = run.telemetry(gradients, t, rate, arrays)
            record["telemetry"].append({"step": t, **found})
        arrays = run.step(gradients, t, rate, arrays)
        done = t + 1
        if done == num_steps or done % args.evaluate_every == 0:
            record["round"].append(done)
            record["accuracy"].append(run.accuracy(arrays[0], *test))
        if done % _SAVE_EVERY == 0 and done < num_steps:
            _save(path, done, arrays, record)
    path.unlink(missing_ok=True)
    num_bytes = [
        densities.count(density)
        * training_programs.Method(method, args, model, density).bytes_a_step
        for density in sorted({*densities})
    ]
    return {**record, "bytes_a_step": round(sum(num_bytes) / num_steps)}


class _Run:
    """The functions of a run, each traced once.

    Args:
        model: A built Keras model.
        method: As of `methods.make_optimizer`, and so the density.
        args: The flags.
        density: See above; None for that of the flags.
    """

    def __init__(self, model, method, args, density=None):
        network = training_programs.Network(model)
        self._method = training_programs.Method(method, args, model, density)
        self.density = density
        self.is_sparse = self._method.is_sparse

        @tf.function(autograph=False)
        def gradients(weights, images, labels):
            # Those of each worker where they look ahead.
            at = [weights] * args.num_workers
            if weights.shape.rank == 2:
                at = tf.unstack(weights)
            # Not a loop of TensorFlow's, in which its convolutions are slower
            # by half.
            return tf.stack(
                [
                    network.gradient(at[n], images[n], labels[n])
                    for n in range(args.num_workers)
                ]
            )

        self._gradients = gradients
        self._predict = tf.function(network.predict, autograph=False)
        self._step = tracing.compiled(self._method.step)
        self._telemetry = tracing.compiled(self._method.telemetry)
        self._look_ahead = None
        if args.look_ahead != "none":
            self._method.check_look_ahead()
            self._look_ahead = tracing.compiled(
                functools.partial(self._method.look_ahead, args.look_ahead)
            )

    def start(self, weights):
        return self._method.start(weights)

    def go_on(self, arrays):
        return self._method.go_on(arrays)

    def gradients(self, rate, arrays, images, labels):
        weights = arrays[0]
        if self._look_ahead:
            weights = self._look_ahead(tf.constant(rate, tf.float32), *arrays)
        return self._gradients(
            weights, tf.constant(images), tf.constant(labels, tf.int32)
        )

    def step(self, gradients, t, rate, arrays):
        return self._step(
            gradients, tf.constant(t), tf.constant(rate, tf.float32), *arrays
        )

    def telemetry(self, gradients, t, rate, arrays):
        of_workers = self._telemetry(
            gradients, tf.constant(t), tf.constant(rate, tf.float32), *arrays
        )
        return self._method.by_name(of_workers)

    def accuracy(self, weights, images, labels):
        predicted = [
            self._predict(
                weights, tf.constant(images[i : i + _NUM_PREDICTED])
            ).numpy()
            for i in range(0, len(images), _NUM_PREDICTED)
        ]
        return float(np.mean(np.concatenate(predicted) == labels))


def _file_name(method):
    """A method as a part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in method)


def _save(path, step, arrays, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        json.dumps({"step": step, "record": record}),
        *[array.numpy() for array in arrays],
    )
    os.replace(part, path)


def _load(path):
    with np.load(path) as file:
        text, *arrays = (file[name] for name in file.files)
    kept = json.loads(str(text))
    return kept["step"], [tf.constant(a) for a in arrays], kept["record"]
