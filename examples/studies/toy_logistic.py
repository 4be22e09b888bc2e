r"""Two workers, two weights, one entry sent a step: why Top-k stalls.

The workers' first gradient entries are a hundred times larger than the second
ones, and cancel each other.  Top-k sends them all the same and stands still,
until the residual error of the second entry has grown as large; then it sends
that at once, a step a hundred times too long.  RegTop-k sees that nothing
remains of the first entries in the sum, sends the second one, and follows the
dense curve.

    python examples/studies/toy_logistic.py

Source: Bereyhi, Liang, Boudreau, Afana, "Regularized Top-k: A Bayesian
Framework for Gradient Sparsification".
"""

import pathlib
import sys

from absl import app
from absl import flags
import keras
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import example_utils
import methods


def define_flags():
    flags.DEFINE_integer(
        "rounds", 150, "Number of training steps.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", 0.9, "Learning rate.")
    methods.define_method_flags(mu=1.0)
    flags.DEFINE_string(
        "output_dir", "results/toy_logistic", "Where the results go."
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(methods)


# One data point a worker, both of class 1.
_FEATURES = np.array([[[100.0, 1.0]], [[-100.0, 1.0]]])
_START = np.array([[0.0], [1.0]])


def loss(weights):
    """The mean over both points x of log(1 + exp(-<x, w>))."""
    return np.mean(np.logaddexp(0.0, -_FEATURES @ weights))


def rounds_without_progress(curve):
    """The number of rounds after which the loss is still that of the start."""
    return int(np.argmax(np.append(curve, -np.inf) < loss(_START)))


def train(optimizer_fn, strategy, rounds, title):
    """Trains from the weights (0, 1).

    Returns:
        Array `[rounds]`: the loss after each step.
    """
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([2]), keras.layers.Dense(1, use_bias=False)]
        )
        model.set_weights([_START])
        model.compile(
            optimizer=optimizer_fn(),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
        )
    return example_utils.train_full_batch(
        model,
        _FEATURES,
        np.ones([2, 1, 1]),
        rounds,
        lambda weights: loss(weights[0]),
        title,
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    keras.config.set_floatx("float64")
    strategy = example_utils.simulated_workers(len(_FEATURES))
    losses = {}
    for method in args.methods:
        losses[method] = train(
            lambda method=method: methods.make_optimizer(
                method,
                args,
                args.learning_rate,
                density=0.5,  # One of two entries.
            ),
            strategy,
            args.rounds,
            method,
        )

    results = {
        method: {
            "final_loss": float(curve[-1]),
            "rounds_without_progress": rounds_without_progress(curve),
        }
        for method, curve in losses.items()
    }
    print(f"\n{'method':10} {'final loss':>10}   rounds without progress")
    for method, result in results.items():
        print(
            f"{method:10} {result['final_loss']:10.6f}"
            f"   {result['rounds_without_progress']:6}"
        )

    def draw(axes):
        for method, curve in losses.items():
            axes.semilogy(curve, **example_utils.style(method))
        axes.set_xlabel("round")
        axes.set_ylabel("loss")
        axes.legend()

    example_utils.save_results(
        args.output_dir,
        {
            "config": example_utils.config(),
            "methods": results,
        },
        draw,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
