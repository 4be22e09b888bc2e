r"""Linear regression at many densities: which methods reach the optimum?

The problem of `linear_regression.py`, for several seeds and densities, with all
workers in one compiled program.

    python examples/studies/density_sweep.py --densities=0.01,0.6 --seeds=0,1
"""

import pathlib
import sys

from absl import app
from absl import flags
import keras
import numpy as np
import tensorflow as tf
import tqdm

import tf_regtopk
from tf_regtopk import simulation

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import example_utils
import linear_regression
import methods
import shift_variants

methods.METHODS.update(shift_variants.METHODS)

_METHODS = (
    "topk_no_feedback",
    "topk",
    "regtopk",
    "ef21",
    "shift",
    "shift_regtopk",
)


def define_flags():
    linear_regression.define_problem_flags()
    flags.DEFINE_list(
        "densities",
        ["0.01", "0.05", "0.1", "0.3", "0.5", "0.6", "0.8", "1"],
        "Shares of the gradient entries that are sent.",
    )
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds of the data.")
    flags.DEFINE_float(
        "keep",
        None,
        "Entries are summed by their owners, which keep as many sums as "
        "`ReduceScatter(keep=...)` says. Without it by an all-gather.",
    )
    methods.define_method_flags(mu=4.0, methods=_METHODS)
    flags.DEFINE_string(
        "output_dir", "results/density_sweep", "Where the results go."
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(linear_regression)
    flags.adopt_module_key_flags(methods)


def make_training(method, density, args):
    """Compiles a training that serves the data of all seeds.

    Returns:
        `(training, learning_rate)`, for `train`.
    """
    topology = tf_regtopk.AllGather()
    if args.keep:
        topology = tf_regtopk.ReduceScatter(keep=args.keep)
    optimizer = methods.make_optimizer(
        method, args, args.learning_rate, density, topology=topology
    )

    def gradients_of(w, data, step):
        del step  # All data, in each of them.
        gram, moment, _ = data
        return 2 * (tf.einsum("njk,k->nj", gram, w) - moment)

    def distance(w, data):
        return tf.reduce_sum((w - data[-1]) ** 2)

    training = simulation.gradient_descent(
        simulation.descent_of(optimizer, args.num_workers),
        gradients_of,
        distance,
        args.rounds,
    )
    return training, float(optimizer.learning_rate)


def train(training, learning_rate, problem):
    """Returns log10 ||w - w*||^2 after each step."""
    features, targets, optimum = problem
    num_points, dimension = features.shape[1:]
    # All that the squared error needs of the data.
    gram = np.einsum("nij,nik->njk", features, features) / num_points
    moment = np.einsum("nij,nio->nj", features, targets) / num_points
    data = tuple(tf.constant(part) for part in (gram, moment, optimum))
    start = tf.zeros([dimension], tf.float64)
    return np.log10(training(start, learning_rate, data).numpy())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    # It would warn of a program for each method.
    tf.get_logger().setLevel("ERROR")
    densities = [float(density) for density in args.densities]
    keras.config.set_floatx("float64")
    problems = [
        linear_regression.make_problem(
            args.num_workers,
            args.dimension,
            args.points_per_worker,
            int(seed),
        )
        for seed in args.seeds
    ]

    finals = {}
    for method in args.methods:
        final = []
        for density in tqdm.tqdm(densities, desc=method):
            training = make_training(method, density, args)
            final.append([train(*training, p)[-1] for p in problems])
        finals[method] = np.array(final)

    print("\nfinal log10 ||w - w*||^2: median (min .. max)")
    print(f"{'density':>8}" + "".join(f"{m:>24}" for m in args.methods))
    for i, density in enumerate(densities):
        cells = (
            f"{np.median(f[i]):.1f} ({f[i].min():.1f} .. {f[i].max():.1f})"
            for f in finals.values()
        )
        print(f"{density:8g}" + "".join(f"{cell:>24}" for cell in cells))

    def draw(axes):
        for method, final in finals.items():
            example_utils.plot_band(axes, densities, final.T, method)
        axes.set_xscale("log")
        axes.set_xlabel("density")
        axes.set_ylabel(r"final $\log_{10} \|w - w^*\|^2$")
        axes.set_title(f"{args.num_workers} workers, {args.rounds} rounds")
        axes.legend()

    example_utils.save_results(
        args.output_dir,
        {
            "config": example_utils.config(),
            "densities": densities,
            "final_log10_distance": {m: f.tolist() for m, f in finals.items()},
        },
        draw,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
