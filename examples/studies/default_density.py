"""Shows how many entries a small model needs per step.

Digits, dense layers of several widths, two replicas, a few epochs: accuracy on
held-out images by the number k of entries sent, in place of a density, because
0.1 % of a small model is next to nothing.

    python examples/studies/default_density.py
"""

import statistics

from absl import app
from absl import flags
import example_utils
import keras
import quickstart

import tf_regtopk


def define_flags():
    flags.DEFINE_list("units", ["64", "256", "1024"], "Hidden units.")
    flags.DEFINE_list("ks", ["20", "100", "300", "1000", "3000"], "k.")
    flags.DEFINE_integer("seeds", 3, "Runs of each.", lower_bound=1)
    flags.DEFINE_integer("epochs", 5, "Epochs of a run.", lower_bound=1)
    flags.DEFINE_string(
        "output_dir", "results/default_density", "Where the results go."
    )


def make_model(units, k):
    """A model of dense layers; `k` of None trains it with plain SGD."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if k is not None:
        density = min(1.0, k / model.count_params())
        optimizer = tf_regtopk.SparsifiedOptimizer(
            optimizer, tf_regtopk.RegTopK(density)
        )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    strategy = quickstart.make_strategy()
    images, digits = quickstart.load_digits()
    rows = []
    for units in map(int, args.units):
        for k in [None, *map(int, args.ks)]:
            accuracies = []
            for seed in range(args.seeds):
                keras.utils.set_random_seed(seed)
                with strategy.scope():
                    model = make_model(units, k)
                model.fit(
                    images[:1408],
                    digits[:1408],
                    batch_size=64,
                    epochs=args.epochs,
                    verbose=0,
                )
                accuracies.append(
                    model.evaluate(images[1408:], digits[1408:], verbose=0)[1]
                )
            rows.append(
                {
                    "weights": model.count_params(),
                    "k": k,
                    "accuracies": accuracies,
                }
            )
            print(
                f"{model.count_params():>9,} weights, "
                f"{'dense' if k is None else f'k = {k:,}':>9}: "
                f"{statistics.mean(accuracies):.3f} "
                f"({min(accuracies):.3f} to {max(accuracies):.3f})"
            )
            keras.utils.clear_session()
    example_utils.save_summary(args.output_dir, rows)


if __name__ == "__main__":
    define_flags()
    app.run(main)
