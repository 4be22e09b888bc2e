r"""Writes the programs that XLA is given, to be timed where TensorFlow is not.

For a GPU machine that has JAX: XLA's compiler is the same there, if not of the
same version.

    python benchmarks/export_stablehlo.py --output_dir=stablehlo
    python benchmarks/run_stablehlo.py stablehlo        # on that machine
"""

import json
import os

from absl import app
from absl import flags
import tensorflow as tf
import tqdm

import tf_regtopk
from tf_regtopk import aggregation
from tf_regtopk import device_kind
from tf_regtopk import error_feedback
from tf_regtopk import radix
from tf_regtopk import selection

NUM_WORKERS = 8
NUM_THRESHOLDS = 16


def define_flags():
    flags.DEFINE_list("sizes", ["25600000", "100000000"], "Values of J.")
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_string("output_dir", "stablehlo", "Where the programs go.")
    flags.DEFINE_enum(
        "compile_for", "GPU", ["GPU", "CPU"], "What JAX will run them on."
    )


def programs_for(size, density):
    """Name to `(function, shapes and dtypes of its arguments)`."""
    sparsifier = tf_regtopk.RegTopK(density)
    group = selection.Group(size, sparsifier.num_selected(size))

    def step(error, g, indices, one_plus_delta, step):
        memory = indices, one_plus_delta
        a = error_feedback.accumulate(error, g)
        scores = sparsifier.score(a, memory, step)
        selected = selection.select_largest(scores, [group], step)
        a = sparsifier.restore(a, scores, memory, selected)
        return selected, tf.gather(a, selected), a

    def sum_entries(indices, values):
        return aggregation.sum_entries(indices, values, size)

    def histogram(keys):
        return radix.digit_histogram(keys, 0, 16, tf.zeros([1], tf.int32), 16)

    def count_thresholds(keys, thresholds):
        reached = keys[tf.newaxis] >= thresholds[:, tf.newaxis]
        return tf.reduce_sum(tf.cast(reached, tf.int32), axis=1)

    gradient, k = ("float32", [size]), group.k
    sent = [("int32", [k]), ("float32", [k])]
    entries = [(dtype, [NUM_WORKERS, *shape]) for dtype, shape in sent]
    scalar = ("int32", [])
    return {
        "RegTopK step": (step, [gradient, gradient, *sent, scalar]),
        "selection": (
            lambda a, step: selection.select_largest(a, [group], step),
            [gradient, scalar],
        ),
        "tf.math.top_k": (
            lambda a: tf.math.top_k(tf.abs(a), k, sorted=False)[1],
            [gradient],
        ),
        "sum of 8": (sum_entries, entries),
        "digit histogram": (histogram, [("int32", [size])]),
        "16 thresholds": (
            count_thresholds,
            [("int32", [size]), ("int32", [NUM_THRESHOLDS])],
        ),
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    os.makedirs(args.output_dir, exist_ok=True)
    index = []
    for size in map(int, args.sizes):
        for density in map(float, args.densities):
            programs = programs_for(size, density)
            for name, (function, arguments) in tqdm.tqdm(
                programs.items(), desc=f"J={size} density={density:g}"
            ):
                specs = [
                    tf.TensorSpec(shape, dtype) for dtype, shape in arguments
                ]
                compiled = tf.function(
                    function, jit_compile=True, autograph=False
                )
                with device_kind.compile_for(args.compile_for):
                    ir = compiled.experimental_get_compiler_ir(*specs)
                    text = ir(stage="stablehlo")
                file = f"{len(index)}.mlir"
                with open(
                    os.path.join(args.output_dir, file), "w", encoding="utf-8"
                ) as f:
                    f.write(text)
                index.append(
                    {
                        "file": file,
                        "name": name,
                        "size": size,
                        "density": density,
                        "k": tf_regtopk.TopK(density).num_selected(size),
                        "arguments": arguments,
                    }
                )
    with open(
        os.path.join(args.output_dir, "index.json"), "w", encoding="utf-8"
    ) as f:
        json.dump(index, f, indent=2)
    print(f"Wrote {len(index)} programs to {args.output_dir}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
