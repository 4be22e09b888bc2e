r"""ImageNette: fine-tunes a network that ImageNet has trained, sparsely.

Ten easy classes of ImageNet, and any model of `keras.applications`, of which
the last layer is new. Every method starts from the same weights and sees the
same batches; N simulated workers exchange their entries in every step.

    python examples/studies/imagenette_finetune.py --trainable=head

The first run loads the images and the weights. Several learning rates are
compared, and runs kept, as in `cifar10_resnet.py`.

Source: the images are those of https://github.com/fastai/imagenette.
"""

import pathlib
import sys

from absl import app
from absl import flags
import keras
import tensorflow as tf

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import example_utils
import image_training
import worker_data

HELD_OUT = 1000


def define_flags():
    flags.DEFINE_string(
        "model", "MobileNetV2", "Name of a model of `keras.applications`."
    )
    flags.register_validator(
        "model",
        lambda name: callable(getattr(keras.applications, name, None)),
        "must be the name of a model of `keras.applications`",
    )
    flags.DEFINE_enum(
        "weights", "imagenet", ["imagenet", "none"], "What to start from."
    )
    flags.DEFINE_enum(
        "trainable",
        "all",
        ["all", "head"],
        "What is trained: all weights, or those of the new last layer.",
    )
    flags.DEFINE_integer(
        "image_size", 160, "Height and width of the images.", lower_bound=32
    )
    worker_data.define_loading_flags()
    comparison.define_flags(
        output_dir="results/imagenette_finetune",
        learning_rates=(0.01,),
        batch_size=20,
        rounds=400,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(comparison)


def load_images(split, args):
    """Square images `[n, size, size, 3]` as uint8, and their labels `[n]`."""
    size = args.image_size

    def square(image):
        image = tf.image.resize(image, [size, size], antialias=True)
        return tf.cast(tf.round(image), tf.uint8)

    name = "imagenette/160px-v2" if size <= 160 else "imagenette/320px-v2"
    return worker_data.load_images(name, split, args.data_dir, square)


def build_model(args):
    """A network with a new last layer of ten logits."""
    application = getattr(keras.applications, args.model)
    shape = (args.image_size, args.image_size, 3)
    backbone = application(
        include_top=False,
        weights=None if args.weights == "none" else args.weights,
        input_shape=shape,
        pooling="avg",
    )
    backbone.trainable = args.trainable == "all"
    # Each family of models has its own, beside them.
    preprocess = sys.modules[application.__module__].preprocess_input
    images = keras.Input(shape)
    features = backbone(preprocess(keras.ops.cast(images, "float32")))
    return keras.Model(images, keras.layers.Dense(10)(features))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    strategy = example_utils.simulated_workers(args.num_workers)
    image_training.compare(
        *(load_images(split, args) for split in ("train", "validation")),
        lambda: build_model(args),
        HELD_OUT,
        strategy,
        args,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
