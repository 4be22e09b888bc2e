"""What examples and studies share: simulated workers, flags and results."""

import json
import os
import sys

from absl import flags
import keras
import matplotlib
import numpy as np
import tensorflow as tf
import tqdm

matplotlib.use("Agg")  # Writes files; needs no display.
from matplotlib import pyplot as plt

# The flags below are those of the scripts, whose --help lists them.
flags.disclaim_key_flags()


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


# The colour of a method in all figures, and the dashes of those whose curves
# often lie on another's.
_COLOURS = {
    "dense": "black",
    "dense_float16": "dimgray",
    "topk": "tab:orange",
    "topk_no_feedback": "tab:gray",
    "regtopk": "tab:blue",
    "regtopk_local": "tab:cyan",
    "dgc": "tab:green",
    "powersgd1": "gold",
    "powersgd4": "darkkhaki",
    "ef21": "tab:purple",
    "shift": "tab:pink",
    "shift_regtopk": "tab:red",
    "shift_regtopk_inner": "tab:olive",
    "shift_masked": "tab:brown",
    "shift_at_once": "navy",
    "local_adam": "teal",
    "adam_without_mean": "plum",
}
_DASHES = {"dense": (1, 1), "regtopk": (4, 2), "shift_regtopk": (4, 2)}


def style(method):
    """The arguments of `Axes.plot` for a method.

    Args:
        method: Name of a method. One with `_sign` has the colour of the method
            that sends whole values, and other dashes.
    """
    name = method.removesuffix("_sign")
    dashes = (6, 1, 1, 1) if method != name else _DASHES.get(name)
    found = {} if name not in _COLOURS else {"color": _COLOURS[name]}
    if dashes:
        found["dashes"] = dashes
    return {**found, "label": method}


def plot_band(axes, x, values, method, **changes):
    """Plots the mean of rows of values, and their range around it.

    Args:
        axes: A matplotlib `Axes`.
        x: What the columns of the values are at.
        values: Rows of values.
        method: Name of the method that they are of.
        **changes: Arguments of `Axes.plot` in place of those of `style`.

    Returns:
        The colour.
    """
    [line] = axes.plot(
        x, np.mean(values, axis=0), **{**style(method), **changes}
    )
    axes.fill_between(
        x,
        np.min(values, axis=0),
        np.max(values, axis=0),
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )
    return line.get_color()


def save_summary(output_dir, summary):
    """Writes `summary.json` into a folder that may be missing.

    Returns:
        The path of the file.
    """
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(summary, f, indent=2)
    return path


def save_results(output_dir, summary, draw, num_plots=1):
    """Writes `summary.json` and the figure `curves.png`.

    Args:
        output_dir: Folder, made if it is missing.
        summary: What goes into the JSON file.
        draw: Function of a matplotlib `Axes` that draws the figure; of as many
            as there are plots.
        num_plots: Number of plots beside each other.
    """
    summary_path = save_summary(output_dir, summary)
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
