r"""CIFAR-10 for thousands of steps: accuracy at equal bytes.

The network and the shards are those of `cifar10_resnet.py`. All workers are
simulated in one process that uses one core, with the step of the library in one
compiled program, and the learning rate decays.

    python examples/studies/cifar10_long.py --split=dirichlet:0.1 --seeds=0,1,2

Learning rates are compared on images held out of the training set, in shorter
trainings. A run goes on where it was stopped, and runs that have finished are
kept in `runs.jsonl` in `--output_dir`. Processes for different methods, splits
or seeds may run beside each other.

A method `..._sign` sends one bit a value, and 4 times the entries: about the
same bytes.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"
(2009).
"""

import os
import pathlib
import sys

# TensorFlow's default on processors without AVX-512 is half as fast, and must
# be changed before it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from absl import app
from absl import flags
import cifar10_resnet
import image_training
import resnet
import simulated_training
import tensorflow as tf
import worker_data


def define_flags():
    flags.DEFINE_enum(
        "model", "resnet8", list(resnet.MODELS), "resnet8 is for CPUs."
    )
    flags.DEFINE_enum(
        "norm", "group", ["group"], "Normalisation: of each image alone."
    )
    worker_data.define_loading_flags()
    simulated_training.define_flags(
        output_dir="results/cifar10_long",
        learning_rates=(0.01, 0.03, 0.1),
        batch_size=5,
    )
    flags.DEFINE_integer(
        "max_images",
        None,
        "Train and test on the first images only, as many as this.",
        lower_bound=1,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(simulated_training)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    simulated_training.use_one_core()
    (images, labels), test = (
        worker_data.load_images(
            "cifar10", split, args.data_dir, max_images=args.max_images
        )
        for split in ("train", "test")
    )
    task = image_training.Task(
        lambda: cifar10_resnet.build_model(args),
        tf.constant(images),
        labels,
        test,
        min(cifar10_resnet.HELD_OUT, len(labels) // 10),
    )
    simulated_training.compare(task, args, args.model)


if __name__ == "__main__":
    define_flags()
    app.run(main)
