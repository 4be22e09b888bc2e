r"""Writes the training of cifar10_resnet.py as programs for JAX.

For a GPU machine that has JAX and not TensorFlow: what XLA is given is the same
there. Takes the flags of that example. TensorFlow must be 2.19 or newer here,
because older ones write no StableHLO. The second command is for that machine:

    python -m benchmarks.accelerators.export_training --model=resnet18
    python benchmarks/with_jax/run_training.py programs --output=runs.jsonl

With runs.jsonl in its --output_dir, `cifar10_resnet.py` with the same flags
finds all runs done, and reports them.
"""

import json
import pathlib
import urllib.parse

from absl import app
from absl import flags
import cifar10_resnet
import comparison
import image_training
import keras
import numpy as np
import tensorflow as tf
import tqdm
import training_programs
import worker_data

from tf_regtopk.kernels import device_kind

NUM_PREDICTED = 500  # Images that labels are predicted for at a time.


def define_flags():
    cifar10_resnet.define_flags()
    flags.DEFINE_string("programs_dir", "programs", "Where the programs go.")
    flags.DEFINE_enum(
        "compile_for", "GPU", ["GPU", "CPU"], "What JAX will run them on."
    )
    flags.register_validator(
        "norm",
        lambda norm: norm == "group",
        "must be group: moving statistics are not carried from step to step",
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(cifar10_resnet)


def export(function, path, *specs):
    """Writes a function as a program.

    Args:
        function: Function of tensors that returns one, or a list of them.
        path: Where to.
        *specs: `tf.TensorSpec` of its arguments.

    Returns:
        List of `tf.TensorSpec` of its results.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    concrete = compiled.get_concrete_function(*specs)
    if concrete.captured_inputs:
        raise ValueError(
            "What is exported must depend on its arguments only. Received: "
            f"{concrete.captured_inputs}"
        )
    ir = compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo")
    path.write_text(ir, "utf-8")
    return [
        tf.TensorSpec(result.shape, result.dtype) for result in concrete.outputs
    ]


def file_name(method):
    """What a method is called in the names of its files.

    A user's method is called `folder/file.py:function`, which no file can be.
    The quoted form can, and no two methods share one.
    """
    return urllib.parse.quote(method, safe="")


def export_programs(directory, network, methods, num_images, args):
    """Writes the gradients, the prediction, and what each method needs."""
    weights = tf.TensorSpec([network.size], tf.float32)
    images = [32, 32, 3]
    [gradients] = export(
        network.gradients,
        directory / "gradients.mlir",
        weights,
        tf.TensorSpec([num_images, *images], tf.uint8),
        tf.TensorSpec([num_images], tf.int32),
        tf.TensorSpec([args.num_workers, args.batch_size], tf.int32),
    )
    export(
        network.predict,
        directory / "predict.mlir",
        weights,
        tf.TensorSpec([NUM_PREDICTED, *images], tf.uint8),
    )
    for name, method in tqdm.tqdm(methods.items(), desc="methods"):
        name = file_name(name)
        arrays = export(method.start, directory / f"start_{name}.mlir", weights)
        after = export(
            method.step,
            directory / f"step_{name}.mlir",
            gradients,
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([], tf.float32),
            *arrays,
        )
        assert after == arrays, (after, arrays)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    directory = pathlib.Path(args.programs_dir)
    directory.mkdir(parents=True, exist_ok=True)
    splits = {
        split: worker_data.load_images(
            "cifar10", split, args.data_dir, max_images=args.max_images
        )
        for split in ("train", "test")
    }
    np.savez(
        directory / "images.npz",
        **{
            f"{split}_{kind}": array
            for split, arrays in splits.items()
            for kind, array in zip(("images", "labels"), arrays, strict=True)
        },
    )
    _, labels = splits["train"]
    held_out = min(cifar10_resnet.HELD_OUT, len(labels) // 10)
    rates = [float(rate) for rate in args.learning_rates]
    seeds = [int(seed) for seed in args.seeds]
    # With one learning rate there is nothing to tune.
    tuning_seeds = [int(s) for s in args.tuning_seeds if len(rates) > 1]
    for seed in tqdm.tqdm({*seeds, *tuning_seeds}, desc="seeds"):
        # As image_training.train does.
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model = cifar10_resnet.build_model(args)
        numbers = image_training.numbers_of(
            labels[: len(labels) - held_out], args, seed, args.rounds
        )
        np.savez(
            directory / f"start_{seed}.npz",
            numbers=numbers.astype(np.int32),
            weights=np.concatenate([w.ravel() for w in model.get_weights()]),
        )
    methods = {
        name: training_programs.Method(name, args, model)
        for name in args.methods
    }
    network = training_programs.Network(model)
    with device_kind.compile_for(args.compile_for):
        export_programs(directory, network, methods, len(labels), args)
    config = {
        flag.name: flag.value
        for flag in args.get_key_flags_for_module(cifar10_resnet)
    }
    index = {
        "setting": comparison.shared_setting(config),
        "file_names": {n: file_name(n) for n in methods},
        "versions": {n: m.version for n, m in methods.items()},
        "bytes_a_step": {n: m.bytes_a_step for n, m in methods.items()},
        "learning_rates": rates,
        "seeds": seeds,
        "tuning_seeds": tuning_seeds,
        "held_out": held_out,
        "num_predicted": NUM_PREDICTED,
    }
    path = directory / "index.json"
    path.write_text(json.dumps(index, indent=2), "utf-8")
    print(f"Wrote {len(methods)} methods to {directory}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
