"""What the examples share: simulated workers, recording and results."""

import json
import os
import sys

from absl import flags
import keras
import matplotlib
import numpy as np
import shift_variants
import tensorflow as tf
import tqdm

import tf_regtopk

matplotlib.use("Agg")  # Writes files; needs no display.
from matplotlib import pyplot as plt


def simulated_workers(num_workers):
    """A `MirroredStrategy` in which every replica plays one worker.

    Uses GPUs where there are enough, else splits the CPU into logical devices.

    Args:
        num_workers: Number of replicas.

    Returns:
        A `tf.distribute.MirroredStrategy`.
    """
    # TensorFlow notes every gather at level INFO.
    tf.get_logger().setLevel("WARNING")
    if len(tf.config.list_physical_devices("GPU")) >= num_workers:
        return tf.distribute.MirroredStrategy(
            [f"GPU:{i}" for i in range(num_workers)]
        )
    # The background threads of tf.data's autotuning can starve when many
    # replicas share few cores; this mode runs without them.  It has to be set
    # before the first data set.
    tf.data.experimental.enable_debug_mode()
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * num_workers
        )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_workers)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def full_batch_dataset(features, targets):
    """Worker n's whole data as replica n's batch, in every step.

    Args:
        features: Array `[workers, points, dimension]`.
        targets: Array `[workers, points, 1]`.

    Returns:
        An endless `tf.data.Dataset` of global batches, which the strategy
        splits into equal consecutive parts, one a replica.
    """
    merged = [a.reshape([-1, a.shape[-1]]) for a in (features, targets)]
    return tf.data.Dataset.from_tensors(tuple(merged)).repeat()


METHODS = (
    "dense",
    "topk_no_feedback",
    "topk",
    "regtopk",
    "regtopk_local",
    "randomk",
    "dgc",
    "ef21",
    "shift",
    "shift_regtopk",
    "shift_regtopk_inner",
    "shift_slow",
    "shift_fast",
    "shift_masked",
    "shift_rounded",
)


def define_density_flag(default):
    """Defines the flag `density`, a share in (0, 1]."""
    flags.DEFINE_float(
        "density", default, "Share of the gradient entries that are sent."
    )
    flags.register_validator(
        "density",
        lambda density: 0 < density <= 1,
        "must be in (0, 1]: 0.6 sends 60 % of the entries",
    )


def define_codec_flags():
    """Defines the flags `indices` and `values`, see `tf_regtopk.Codec`."""
    flags.DEFINE_enum(
        "indices",
        "auto",
        ["auto", "int32", "elias_fano", "golomb", "bitmap"],
        "How the indices of the entries are written.",
    )
    flags.DEFINE_enum(
        "values",
        "float32",
        [
            "float32",
            "bfloat16",
            "float16",
            "natural",
            "uniform",
            "sign",
            "ternary",
        ],
        "How the values of the entries are written; float32: as they are.",
    )


def define_method_flags(mu, methods=("dense", "topk", "regtopk")):
    """Defines the flags for the methods to compare; both are defaults."""
    flags.DEFINE_list(
        "methods",
        list(methods),
        f"Methods to compare, of {', '.join(METHODS)}.",
    )
    flags.register_validator(
        "methods",
        lambda methods: methods and set(methods) <= set(METHODS),
        f"must be among {', '.join(METHODS)}",
    )
    define_codec_flags()
    flags.DEFINE_float("mu", mu, "RegTop-k's mu.")
    flags.DEFINE_enum(
        "denominator", "previous", ["previous", "current"], "RegTop-k's form."
    )


def make_optimizer(
    method, args, learning_rate, density, momentum=0.0, adam=False
):
    """Gradient descent as it is for "dense", else wrapped for the method.

    Momentum is the inner optimizer's, but the workers' own for "regtopk_local",
    "dgc", "ef21", and all of "shift" but the "inner" one. At density 1 all
    methods take the same steps (but "dgc" and "shift_masked", which then have
    no momentum, and "shift_rounded").

    Args:
        method: One of `METHODS`.
        args: The flags of `define_method_flags`.
        learning_rate: Float.
        density: The share of entries that are sent.
        momentum: Float in [0, 1).
        adam: Boolean, whether the inner optimizer is Adam; without momentum,
            which it has of its own.
    """

    def inner(momentum, scale=1.0):
        if adam:
            return keras.optimizers.Adam(learning_rate)
        return keras.optimizers.SGD(scale * learning_rate, momentum)

    if method == "dense":
        return inner(momentum)
    topk = tf_regtopk.TopK(density)
    regtopk = tf_regtopk.RegTopK(density, args.mu, denominator=args.denominator)
    accumulate = tf_regtopk.Accumulate()
    dgc = tf_regtopk.Accumulate(momentum, factor_masking=momentum > 0)
    # It averages gradients where momentum adds them up.
    ef21, averaging = tf_regtopk.EF21(1 - momentum), 1 / (1 - momentum)
    shift = tf_regtopk.LearnedShift(momentum=momentum)
    inner_optimizer, sparsifier, error_feedback = {
        "topk_no_feedback": (inner(momentum), topk, tf_regtopk.NoFeedback()),
        "topk": (inner(momentum), topk, accumulate),
        "regtopk": (inner(momentum), regtopk, accumulate),
        "regtopk_local": (
            inner(0.0),
            regtopk,
            tf_regtopk.Accumulate(momentum),
        ),
        "randomk": (inner(momentum), tf_regtopk.RandomK(density), accumulate),
        "dgc": (inner(0.0), topk, dgc),
        "ef21": (inner(0.0, averaging), topk, ef21),
        "shift": (inner(0.0), topk, shift),
        "shift_regtopk": (inner(0.0), regtopk, shift),
        "shift_regtopk_inner": (
            inner(momentum),
            regtopk,
            tf_regtopk.LearnedShift(),
        ),
        "shift_slow": (
            inner(0.0),
            regtopk,
            tf_regtopk.LearnedShift(density / 4, momentum),
        ),
        "shift_fast": (
            inner(0.0),
            regtopk,
            tf_regtopk.LearnedShift(min(1, 4 * density), momentum),
        ),
        "shift_masked": (
            inner(0.0),
            regtopk,
            shift_variants.MaskedShift(momentum=momentum),
        ),
        "shift_rounded": (
            inner(0.0),
            regtopk,
            shift_variants.RoundedShift(momentum=momentum),
        ),
    }[method]
    return tf_regtopk.SparsifiedOptimizer(
        inner_optimizer,
        sparsifier,
        codec=tf_regtopk.Codec(args.indices, args.values),
        error_feedback=error_feedback,
    )


class StepRecorder(keras.callbacks.Callback):
    """Records a number after every step, and shows a progress bar.

    Args:
        measure: Function from the model's list of weights to a float.
        title: What the progress bar says.
    """

    def __init__(self, measure, title):
        super().__init__()
        self._measure = measure
        self._title = title
        self.values = []

    def on_train_begin(self, logs=None):
        self._bar = tqdm.tqdm(total=self.params["steps"], desc=self._title)

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(self._measure(self.model.get_weights())))
        self._bar.update()

    def on_train_end(self, logs=None):
        self._bar.close()


def train_full_batch(model, features, targets, num_steps, measure, title):
    """Fits a compiled model on every worker's whole data, step by step.

    Returns:
        Array `[num_steps]`: `measure` of the weights after each step.
    """
    recorder = StepRecorder(measure, title)
    model.fit(
        full_batch_dataset(features, targets),
        steps_per_epoch=num_steps,
        callbacks=[recorder],
        shuffle=False,
        verbose=0,
    )
    return np.array(recorder.values)


def config():
    """The flags of the script that runs, as a dictionary of their values."""
    return {
        flag.name: flag.value
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    }


def plot_band(axes, x, values, label):
    """Plots the median of rows of values, and their range around it."""
    [line] = axes.plot(x, np.median(values, axis=0), marker=".", label=label)
    axes.fill_between(
        x,
        np.min(values, axis=0),
        np.max(values, axis=0),
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )


def save_results(output_dir, summary, draw, num_plots=1):
    """Writes `summary.json` and the figure `curves.png`.

    Args:
        output_dir: Folder, made if it is missing.
        summary: What goes into the JSON file.
        draw: Function of a matplotlib `Axes` that draws the figure; of as many
            as there are plots.
        num_plots: Number of plots beside each other.
    """
    os.makedirs(output_dir, exist_ok=True)
    summary_path = os.path.join(output_dir, "summary.json")
    with open(summary_path, "w", encoding="utf-8") as f:
        json.dump(summary, f, indent=2)
    figure, axes = plt.subplots(
        1,
        num_plots,
        figsize=(6 * num_plots, 4),
        layout="constrained",
        squeeze=False,
    )
    draw(*axes[0])
    figure_path = os.path.join(output_dir, "curves.png")
    figure.savefig(figure_path, dpi=150)
    plt.close(figure)
    print(f"Wrote {summary_path} and {figure_path}")
