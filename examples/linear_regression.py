r"""Distributed linear regression: Top-k stalls, RegTop-k reaches the optimum.

Every worker holds data of a linear model of its own; together they look for the
weights that fit all data best.  Plain gradient descent, full batches, float64.

    python examples/linear_regression.py
    python examples/linear_regression.py --density=0.4 --methods=topk,regtopk

A reader learns how RegTop-k differs from Top-k, and how a Keras model is given
one worker's data in each replica. `methods.py` tells how a method of your own
is compared with them.

Source: Bereyhi, Liang, Boudreau, Afana, "Regularized Top-k: A Bayesian
Framework for Gradient Sparsification".
"""

from absl import app
from absl import flags
import example_utils
import keras
import methods
import numpy as np


def define_problem_flags():
    """Defines the flags of the problem, and of gradient descent on it."""
    flags.DEFINE_integer("num_workers", 20, "Number of workers.", lower_bound=1)
    flags.DEFINE_integer("dimension", 100, "Number of weights.", lower_bound=1)
    flags.DEFINE_integer(
        "points_per_worker", 500, "Data points of each worker.", lower_bound=1
    )
    flags.DEFINE_integer(
        "rounds", 2500, "Number of training steps.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", 0.01, "Learning rate.")


def define_flags():
    define_problem_flags()
    example_utils.define_density_flag(0.6)
    methods.define_method_flags(mu=4.0)
    flags.DEFINE_integer("seed", 0, "Seed of the data.", lower_bound=0)
    flags.DEFINE_string(
        "output_dir", "results/linear_regression", "Where the results go."
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(methods)


def make_problem(num_workers, dimension, points_per_worker, seed):
    """Random data of the paper's set-up.

    Worker n has features X ~ N(0, 1) and targets X x_n + N(0, 0.5), where
    x_n = m_n 1 + N(0, I) and m_n ~ N(0, 5); 0.5 and 5 are variances.

    Returns:
        `(features, targets, optimum)` of shapes `[workers, points, dimension]`,
        `[workers, points, 1]` and `[dimension]`; the optimum is the
        least-squares solution for the data of all workers together.
    """
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((num_workers, points_per_worker, dimension))
    offset = np.sqrt(5.0) * rng.standard_normal((num_workers, 1))
    weights = offset + rng.standard_normal((num_workers, dimension))
    targets = np.einsum("nij,nj->ni", features, weights)
    targets += np.sqrt(0.5) * rng.standard_normal(targets.shape)
    optimum, *_ = np.linalg.lstsq(
        features.reshape([-1, dimension]), targets.reshape([-1])
    )
    return features, targets[..., np.newaxis], optimum


def train(optimizer_fn, strategy, problem, rounds, title):
    """Trains from zero weights.

    Args:
        optimizer_fn: Function that makes the optimizer.
        strategy: The strategy to train under, one replica a worker.
        problem: What `make_problem` returned.
        rounds: Number of steps.
        title: What the progress bar says.

    Returns:
        Array `[rounds]`: ||w - w*||^2 after each step.
    """
    features, targets, optimum = problem
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([features.shape[-1]]),
                keras.layers.Dense(
                    1, use_bias=False, kernel_initializer="zeros"
                ),
            ]
        )
        model.compile(optimizer=optimizer_fn(), loss="mse")
    return example_utils.train_full_batch(
        model,
        features,
        targets,
        rounds,
        lambda weights: np.sum((weights[0][:, 0] - optimum) ** 2),
        title,
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    keras.config.set_floatx("float64")
    strategy = example_utils.simulated_workers(args.num_workers)
    problem = make_problem(
        args.num_workers,
        args.dimension,
        args.points_per_worker,
        args.seed,
    )

    log_distances = {}
    for method in args.methods:
        distances = train(
            lambda method=method: methods.make_optimizer(
                method, args, args.learning_rate, args.density
            ),
            strategy,
            problem,
            args.rounds,
            method,
        )
        log_distances[method] = np.log10(distances)

    print(f"\n{'method':10} final log10 ||w - w*||^2")
    for method, curve in log_distances.items():
        print(f"{method:10} {curve[-1]:8.2f}")

    def draw(axes):
        for method, curve in log_distances.items():
            axes.plot(curve, **example_utils.style(method))
        axes.set_xlabel("round")
        axes.set_ylabel(r"$\log_{10} \|w - w^*\|^2$")
        axes.set_title(f"{args.num_workers} workers, density {args.density:g}")
        axes.legend()

    example_utils.save_results(
        args.output_dir,
        {
            "config": example_utils.config(),
            "methods": {
                method: {"final_log10_distance": float(curve[-1])}
                for method, curve in log_distances.items()
            },
        },
        draw,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
