r"""A short `fit` of ResNet-18 on GPUs: does it learn, and how fast.

    python -m benchmarks.accelerators.gpu_fit --budget_seconds=60

Under `MirroredStrategy` on all GPUs, of which one alone is split in two, with
images of CIFAR-10's size: templates of ten classes under noise, or CIFAR-10
itself, which tensorflow-datasets finds in `--data_dir`. Each run starts from
the same weights. A run is a method and a dtype policy:

* `regtopk`: RegTop-k and `LearnedShift(momentum=0.9, at_once=True)`;
* `dgc`: Deep Gradient Compression, Top-k and `Accumulate(momentum=0.9,
  factor_masking=True)`;
* `dense`: whole gradients, and SGD with momentum;
* `float32`, or `mixed_float16` with this package's `LossScaleOptimizer`.

Times are those of whole epochs but the first, which traces and compiles, as
the host sees them, input and callbacks included. When the time of
`--budget_seconds` is over the runs that are left are named, and not run.

By default nothing needs cuBLAS, which a machine may lack in the version that
TensorFlow was built for: the logits are the mean of a convolution of 3 x 3.
TensorFlow gives a `Dense` layer to cuBLAS, and a convolution of 1 x 1 as well
unless it has a stride; `--head=dense` is the network as published.
"""

import statistics
import time

from absl import app
from absl import flags
from absl import logging
import keras
import numpy as np
import resnet
import tensorflow as tf

from benchmarks.accelerators import gpu_utils
import tf_regtopk

METHODS = ("regtopk", "dgc", "dense")
POLICIES = ("float32", "mixed_float16")
# Those most worth knowing first.
RUNS = (
    "regtopk:float32",
    "dense:float32",
    "regtopk:mixed_float16",
    "dgc:float32",
    "dense:mixed_float16",
    "dgc:mixed_float16",
)
_NUM_CLASSES = 10


def define_flags():
    flags.DEFINE_list("runs", [*RUNS], "Which of these, in this order.")
    flags.DEFINE_enum("model", "resnet18", [*resnet.MODELS], "The network.")
    flags.DEFINE_enum("norm", "batch", [*resnet.NORMS], "Its normalisation.")
    flags.DEFINE_enum(
        "head", "conv", ["conv", "dense"], "Its last layer; dense needs cuBLAS."
    )
    flags.DEFINE_float("density", 0.001, "k / J.")
    flags.DEFINE_float("learning_rate", 0.02, "Of SGD.")
    flags.DEFINE_integer("batch_size", 256, "Of all replicas.", lower_bound=1)
    flags.DEFINE_integer("epochs", 4, "Of which the first warms up.", 2)
    flags.DEFINE_integer("steps_per_epoch", 30, "Steps.", lower_bound=1)
    flags.DEFINE_string(
        "data_dir",
        None,
        "Where tensorflow-datasets keeps CIFAR-10; else the images are made.",
    )
    flags.DEFINE_float("budget_seconds", 60.0, "No run begins after these.")
    flags.DEFINE_enum("device_type", "GPU", ["GPU", "CPU"], "CPU is for tests.")
    flags.DEFINE_integer(
        "memory_mb", None, "Of each half of a GPU that has to be split."
    )
    flags.DEFINE_string("output_dir", "results/gpu_fit", "For the results.")


def make_images(number, rng):
    """Images of bytes that can be learned, and their labels.

    A template for each class, of coarse squares, under noise.
    """
    coarse = rng.normal(128, 30, [_NUM_CLASSES, 8, 8, 3])
    templates = coarse.repeat(4, axis=1).repeat(4, axis=2)
    labels = rng.integers(_NUM_CLASSES, size=number)
    noise = rng.normal(0, 60, [number, 32, 32, 3])
    images = np.clip(templates[labels] + noise, 0, 255).astype(np.uint8)
    return images, labels


def load_images(args):
    if args.data_dir is None:
        number = min(args.batch_size * args.steps_per_epoch, 20_000)
        return make_images(number, np.random.default_rng(0))
    # Here, because it needs tensorflow-datasets.
    import worker_data

    return worker_data.load_images("cifar10", "train", args.data_dir)


def make_dataset(images, labels, batch_size):
    """Batches without end."""
    dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    dataset = dataset.shuffle(len(labels), seed=0).repeat()
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def build_model(args):
    """The network, which takes images of bytes and returns float32 logits."""
    model = resnet.build_resnet(args.model, args.norm, _NUM_CLASSES)
    logits = model.outputs[0]
    if args.head == "conv":
        pool = next(
            layer
            for layer in model.layers
            if isinstance(layer, keras.layers.GlobalAveragePooling2D)
        )
        x = keras.layers.Conv2D(_NUM_CLASSES, 3, padding="same")(pool.input)
        logits = keras.layers.GlobalAveragePooling2D()(x)
    logits = keras.layers.Activation("linear", dtype="float32")(logits)
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Rescaling(1 / 64, offset=-2.0),
            keras.Model(model.inputs, logits),
        ]
    )


def make_optimizer(method, policy, args):
    if method == "dense":
        sparsified = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate, momentum=0.9),
            exchange="dense",
        )
    elif method == "dgc":
        sparsified = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate),
            tf_regtopk.TopK(args.density),
            error_feedback=tf_regtopk.Accumulate(
                momentum=0.9, factor_masking=True
            ),
        )
    else:
        sparsified = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(args.learning_rate),
            tf_regtopk.RegTopK(args.density),
            error_feedback=tf_regtopk.LearnedShift(momentum=0.9, at_once=True),
        )
    if policy == "mixed_float16":
        return tf_regtopk.LossScaleOptimizer(sparsified), sparsified
    return sparsified, sparsified


class EpochTimes(keras.callbacks.Callback):
    """Seconds of each epoch, of which GPUs have done all at its end."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        gpu_utils.synchronize()
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        gpu_utils.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def fit(name, strategy, dataset, args):
    """A run, and the record of it."""
    method, policy = name.split(":")
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    start = time.perf_counter()
    with strategy.scope():
        model = build_model(args)
        optimizer, sparsified = make_optimizer(method, policy, args)
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    times = EpochTimes()
    history = model.fit(
        dataset,
        epochs=args.epochs,
        steps_per_epoch=args.steps_per_epoch,
        callbacks=[times],
        verbose=0,
    )
    step = statistics.median(times.seconds[1:]) / args.steps_per_epoch
    scale = getattr(optimizer, "dynamic_scale", None)
    return {
        "run": name,
        "parameters": model.count_params(),
        "images_per_second": args.batch_size / step,
        "milliseconds_a_step": 1e3 * step,
        "loss": history.history["loss"],
        "skipped_steps": int(sparsified.skipped_steps.numpy()),
        "loss_scale": None if scale is None else float(scale.numpy()),
        "first_epoch_seconds": times.seconds[0],
        "seconds": time.perf_counter() - start,
    }


HEADER = (
    f"{'run':22} {'images/s':>9} {'ms/step':>8} {'skipped':>8} {'scale':>7} "
    f"{'first s':>8} {'all s':>6}  loss by epoch"
)


def line(r):
    scale = "-" if r["loss_scale"] is None else f"{r['loss_scale']:g}"
    return (
        f"{r['run']:22} {r['images_per_second']:9,.0f} "
        f"{r['milliseconds_a_step']:8.2f} {r['skipped_steps']:8} {scale:>7} "
        f"{r['first_epoch_seconds']:8.1f} {r['seconds']:6.1f}  "
        f"{' '.join(f'{loss:.3f}' for loss in r['loss'])}"
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    known = {f"{method}:{policy}" for method in METHODS for policy in POLICIES}
    if unknown := {*args.runs} - known:
        raise app.UsageError(f"Unknown runs: {sorted(unknown)}")
    logging.set_verbosity(logging.WARNING)
    deadline = time.monotonic() + args.budget_seconds
    num_devices = len(tf.config.list_physical_devices(args.device_type))
    devices = gpu_utils.replica_devices(
        args.device_type, max(2, num_devices), args.memory_mb
    )
    if args.batch_size % len(devices):
        raise app.UsageError(
            "--batch_size must be a multiple of the number of replicas, "
            f"{len(devices)}. Received: {args.batch_size}"
        )
    strategy = tf.distribute.MirroredStrategy(devices)
    dataset = make_dataset(*load_images(args), args.batch_size)
    results = {
        "machine": gpu_utils.machine(),
        "setting": gpu_utils.describe(devices),
        "results": [],
        "failures": {},
        "left": [],
    }
    print(
        f"{results['machine']}\n{results['setting']}, {args.model}, batch "
        f"{args.batch_size}, density {args.density:g}\n{HEADER}",
        flush=True,
    )
    for name in args.runs:
        if time.monotonic() > deadline:
            results["left"].append(name)
            continue
        try:
            results["results"].append(fit(name, strategy, dataset, args))
            print(line(results["results"][-1]), flush=True)
        except (tf.errors.OpError, RuntimeError, ValueError) as e:
            message = f"{type(e).__name__}: {str(e)[:500]}"
            results["failures"][name] = message
            print(f"{name} FAILED: {message}", flush=True)
        gpu_utils.write(args.output_dir, results)
    print(f"Left, for want of time: {results['left'] or 'nothing'}.")
    print(f"Wrote {gpu_utils.write(args.output_dir, results)}.")
    return bool(results["failures"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
