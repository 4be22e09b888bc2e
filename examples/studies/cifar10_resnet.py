r"""CIFAR-10: what each way to send fewer gradient entries costs in accuracy.

Every method trains a residual network from the same weights on the same batches
with the same simulated workers, each of which draws from images of its own.

    python examples/studies/cifar10_resnet.py --split=by_label --seeds=0,1,2

Given several learning rates, each method first trains once with each of them,
with a seed of its own, and keeps the one that is best on 5,000 images held out
of the training set. Runs that have finished are kept in `runs.jsonl` in
`--output_dir`: the same command goes on where it was stopped.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"
(2009).
"""

import pathlib
import sys

from absl import app
from absl import flags
import keras

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import example_utils
import image_training
import resnet
import worker_data

HELD_OUT = 5000


def define_flags():
    flags.DEFINE_enum(
        "model", "resnet8", list(resnet.MODELS), "resnet8 is for CPUs."
    )
    flags.DEFINE_enum(
        "norm",
        "group",
        list(resnet.NORMS),
        "Normalisation: of each image alone, or over a worker's batch.",
    )
    worker_data.define_loading_flags()
    comparison.define_flags(
        output_dir="results/cifar10_resnet",
        learning_rates=(0.05,),
        batch_size=20,
        rounds=1000,
    )
    flags.DEFINE_integer(
        "max_images",
        None,
        "Train and test on the first images only, as many as this.",
        lower_bound=1,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(comparison)


def build_model(args):
    """The network that the flags name, for images of bytes."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Rescaling(1 / 64, offset=-2.0),
            resnet.build_resnet(args.model, args.norm),
        ]
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    strategy = example_utils.simulated_workers(args.num_workers)
    image_training.compare(
        *(
            worker_data.load_images(
                "cifar10", split, args.data_dir, max_images=args.max_images
            )
            for split in ("train", "test")
        ),
        lambda: build_model(args),
        HELD_OUT,
        strategy,
        args,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
