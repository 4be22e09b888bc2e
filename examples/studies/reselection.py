r"""Digits: when RegTop-k's score can matter, and how much it then gains.

RegTop-k scores anew only what was sent in the last step. So its choice differs
from Top-k's only where Top-k would send an entry again in the next step. This
program counts such entries in trainings by RegTop-k, and compares the accuracy
with that of Top-k, from the same weights and on the same batches.

    python examples/studies/reselection.py --error_feedback=none

With error accumulation an entry that was sent starts again from zero, and all
others hold the sum of many steps. Without error feedback all hold one step.
"""

import dataclasses
import pathlib
import sys

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk import simulation
from tf_regtopk.kernels import tracing
from tf_regtopk.steps import telemetry

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import digits_study
import example_utils
import worker_data

_MEASURE_EVERY = 5
ERROR_FEEDBACK = {
    "accumulate": tf_regtopk.Accumulate(),
    "none": tf_regtopk.NoFeedback(),
}


def define_flags():
    worker_data.define_flags()
    flags.DEFINE_integer("num_workers", 8, "Number of workers.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 10, "Images a worker and step.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 500, "Number of steps.", lower_bound=1)
    flags.DEFINE_list(
        "densities", ["0.001", "0.01", "0.1", "0.3", "0.6"], "Densities."
    )
    flags.DEFINE_enum(
        "error_feedback", "accumulate", list(ERROR_FEEDBACK), "The rule."
    )
    flags.DEFINE_float("learning_rate", 0.1, "Learning rate.")
    flags.DEFINE_float(
        "momentum", 0.0, "After the sum.", lower_bound=0.0, upper_bound=0.999
    )
    flags.DEFINE_float("mu", 4.0, "RegTop-k's mu.")
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds.")
    flags.DEFINE_string(
        "output_dir", "results/reselection", "Where the results go."
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(worker_data)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of the k entries of a step, and of what was sent.

    Args:
        again: Entries of the step before that Top-k would send again.
        held_back: Those of them that RegTop-k does not send.
        cancelled: 1 - |sum of all that was sent|_1 / sum of |sent|_1.
    """

    again: float
    held_back: float
    cancelled: float

    @classmethod
    def of(cls, numbers):
        """Those of the numbers of `telemetry.by_name`.

        RegTop-k makes no score larger. So each entry that it sends and Top-k
        would not is in the place of one that it holds back.
        """
        k = numbers["selected"]
        held_back = numbers["unlike_top_k"] / k
        return cls(
            numbers["selected_again"] / k + held_back,
            held_back,
            numbers["cancelled"],
        )


class Training:
    """The steps of a sparsifier, compiled once for all seeds.

    Args:
        sparsifier: `tf_regtopk.Sparsifier`.
        args: The flags.
    """

    def __init__(self, sparsifier, args):
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate, args.momentum),
            sparsifier,
            error_feedback=ERROR_FEEDBACK[args.error_feedback],
        )
        self._sparsifier = sparsifier
        self._rate = tf.constant(args.learning_rate)
        self._descent = simulation.descent_of(optimizer, args.num_workers)

        @tracing.compiled
        def step(state, batch, t):
            gradients = _gradients(state.weights, batch)
            return self._descent.step(state, gradients, t, self._rate)

        @tracing.compiled
        def measure(state, batch, t):
            gradients = _gradients(state.weights, batch)
            return self._descent.telemetry(state, gradients, t, self._rate)

        self._step, self._measure = step, measure

    def run(self, args, seed):
        """Trains from the weights and on the batches of a seed.

        Returns:
            `(accuracy, shares)`: a float, and the list of `Shares` of measured
            steps, one for each worker.
        """
        images, labels, *test = digits_study.data_of(args, False, seed)
        state = self._descent.initial_state(digits_study.start_weights(seed))
        shares = []
        for t in range(args.rounds):
            batch = tf.constant(images[t]), tf.constant(labels[t])
            now = tf.constant(t)
            if (
                isinstance(self._sparsifier, tf_regtopk.RegTopK)
                and t % _MEASURE_EVERY == _MEASURE_EVERY - 1
            ):
                shares += [
                    Shares.of(
                        telemetry.by_name(
                            [array.numpy() for array in arrays],
                            [1],
                            [0],
                            self._sparsifier,
                        )
                    )
                    for arrays in self._measure(state, batch, now)
                ]
            state = self._step(state, batch, now)
        return float(digits_study.accuracy(state.weights, test)), shares


def _gradients(weights, batch):
    images, labels = batch
    return digits_study.gradients_of(weights, ([images], [labels]), 0)


def compare(density, args):
    """Trains by Top-k and by RegTop-k at a density.

    Returns:
        Dictionary for JSON.
    """
    top_k = Training(tf_regtopk.TopK(density), args)
    reg_top_k = Training(tf_regtopk.RegTopK(density, args.mu), args)
    accuracies, shares = [], []
    for seed in map(int, args.seeds):
        plain, _ = top_k.run(args, seed)
        regularised, found = reg_top_k.run(args, seed)
        accuracies.append((plain, regularised))
        shares += found
    plain, regularised = np.array(accuracies).T
    gains = 100 * (regularised - plain)
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return {
        "top_k": float(plain.mean()),
        "gain_points": float(gains.mean()),
        "gain_standard_error": float(error),
        **{
            field.name: float(np.mean([getattr(s, field.name) for s in shares]))
            for field in dataclasses.fields(Shares)
        },
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    # It would warn of a program for each density.
    tf.get_logger().setLevel("ERROR")
    print(
        f"digits, {args.num_workers} workers, {worker_data.describe(args)}, "
        f"error feedback: {args.error_feedback}, rate {args.learning_rate:g}, "
        f"momentum {args.momentum:g}, {args.rounds} steps, "
        f"{len(args.seeds)} seeds"
    )
    print(
        f"{'density':>8} {'again':>7} {'held back':>10} {'cancelled':>10} "
        f"{'Top-k':>7} {'gain of RegTop-k':>18}"
    )
    found = {}
    for density in map(float, args.densities):
        found[str(density)] = row = compare(density, args)
        print(
            f"{density:8g} {row['again']:7.4f} {row['held_back']:10.4f} "
            f"{row['cancelled']:10.4f} {row['top_k']:7.4f} "
            f"{row['gain_points']:+11.2f} +- {row['gain_standard_error']:.2f}"
        )

    def draw(axes):
        for name in ("again", "held_back"):
            shares = [row[name] for row in found.values()]
            axes.plot(list(map(float, found)), shares, "o-", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("density")
        axes.set_ylabel("share of the entries of a step")
        axes.legend()

    example_utils.save_results(
        args.output_dir,
        {"config": example_utils.config(), "densities": found},
        draw,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
