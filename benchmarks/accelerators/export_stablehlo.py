r"""Writes the programs that XLA is given, to be timed where TensorFlow is not.

For a GPU machine that has JAX: XLA's compiler is the same there, if not of the
same version. TensorFlow must be 2.19 or newer here, because older ones write no
StableHLO.

    python -m benchmarks.accelerators.export_stablehlo --output_dir=stablehlo
    python benchmarks/with_jax/run_stablehlo.py stablehlo    # on that machine

The programs of a whole step are for compile_for_gpu.py, which counts kernels
and needs no GPU:

    python -m benchmarks.accelerators.export_stablehlo --output_dir=step \
        --programs=send,decode,settle --sizes=25600000
"""

import itertools
import json
import pathlib

from absl import app
from absl import flags
import tensorflow as tf
import tqdm

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk import selection
from tf_regtopk.codecs import header
from tf_regtopk.error_feedback import equations
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.kernels import words
from tf_regtopk.selection import kth_largest
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import sparse_step

NUM_THRESHOLDS = 16
PARTS = [
    "RegTopK step",
    "selection",
    "tf.math.top_k",
    "sum of all",
    "digit histogram",
    "16 thresholds",
]
STEP = ["send", "decode", "settle"]


class State:
    """A variable for one step: its value, and what is assigned to it."""

    def __init__(self, value):
        self._value = value

    def read_value(self):
        return self._value

    def assign(self, value):
        self._value = value


class Participants:
    """Those of a step without an exchange, as `topology.Participants`."""

    def __init__(self, count):
        self.count = count


def define_flags():
    flags.DEFINE_list("sizes", ["25600000", "100000000"], "Values of J.")
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_list(
        "programs", PARTS, f"Which ones, of {', '.join(PARTS + STEP)}."
    )
    flags.DEFINE_integer("num_workers", 8, "N.", lower_bound=1)
    flags.DEFINE_enum(
        "sparsifier", "RegTopK", ["RegTopK", "TopK"], "Of a whole step."
    )
    flags.DEFINE_string("indices", "auto", "How a whole step writes indices.")
    flags.DEFINE_string("values", "float32", "How a whole step writes values.")
    flags.DEFINE_string("output_dir", "stablehlo", "Where the programs go.")
    flags.DEFINE_enum(
        "compile_for", "GPU", ["GPU", "CPU"], "What JAX will run them on."
    )
    flags.register_validator(
        "programs",
        lambda names: set(names) <= {*PARTS, *STEP},
        f"must be of {', '.join(PARTS + STEP)}",
    )


def parts_for(size, density, args):
    """Name to `(function, shapes and dtypes of its arguments)`."""
    sparsifier = tf_regtopk.RegTopK(density)
    group = selection.Group(size, sparsifier.num_selected(size))

    def step(error, g, indices, one_plus_delta, step):
        memory = indices, one_plus_delta
        a = equations.accumulate(error, g)
        scores = sparsifier.score(a, memory, step)
        selected = selection.select_largest(scores, [group], step)
        a = sparsifier.restore(a, scores, memory, selected)
        return selected, tf.gather(a, selected), a

    def sum_entries(indices, values):
        return scatter_sum.sum_entries(indices, values, size)

    def histogram(keys):
        return kth_largest.digit_histogram(
            keys, 0, 16, tf.zeros([1], tf.int32), 16
        )

    def count_thresholds(keys, thresholds):
        reached = keys[tf.newaxis] >= thresholds[:, tf.newaxis]
        return tf.reduce_sum(tf.cast(reached, tf.int32), axis=1)

    gradient, k = ("float32", [size]), group.k
    sent = [("int32", [k]), ("float32", [k])]
    entries = [(dtype, [args.num_workers, *shape]) for dtype, shape in sent]
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
        "sum of all": (sum_entries, entries),
        "digit histogram": (histogram, [("int32", [size])]),
        "16 thresholds": (
            count_thresholds,
            [("int32", [size]), ("int32", [NUM_THRESHOLDS])],
        ),
    }


def step_for(size, density, args):
    """As `parts_for`, what a step compiles.

    The new state, which is written over the old, comes first of the results of
    `settle`, and the old state last of its arguments.
    """
    sparsifier = getattr(tf_regtopk, args.sparsifier)(density)
    buffer = flat_buffer.FlatBuffer(((size,),), (tf.float32,))
    groups = buffer.groups("global", sparsifier.num_selected)
    [(_, k)] = groups
    codec = tf_regtopk.Codec(args.indices, args.values).payload(k, size)
    initial = sparsifier.initial_memory(k, size, tf.float32)
    memory = [("float32", value.shape.as_list()) for value in initial]
    state_dtypes = round_lib.State(
        (tf.float32,), (), tuple(value.dtype for value in initial)
    )
    step = sparse_step.SparseStep(
        buffer,
        round_lib.Method(sparsifier, tf_regtopk.Accumulate(), codec, groups),
        Participants(args.num_workers),
        state_dtypes,
    )
    has_gradient = (True,)

    def progress_at(number):
        return error_feedback.Progress(tf.zeros([]), tf.cast(number, tf.int64))

    def send(gradient, error, number, rank, *memory):
        return step.send.function.python_function(
            [gradient],
            round_lib.State((error,), (), memory),
            progress_at(number),
            rank,
            has_gradient,
        )

    def decode(payloads, number):
        return step.decode.function.python_function(
            payloads, words.hold(number)
        )

    def settle(all_indices, values, indices, sent, number, *state):
        variables = [State(value) for value in state]
        aggregate = step.settle.function.python_function(
            (all_indices, values),
            (indices, sent),
            round_lib.State(tuple(variables[:1]), (), tuple(variables[1:])),
            progress_at(number),
            has_gradient,
            (),
        )
        return *(variable.read_value() for variable in variables), aggregate

    gradient, scalar = ("float32", [size]), ("int32", [])
    sent = [("float32", [k])] * 2
    entries = [("float32", [args.num_workers, k])] * 2
    num_words = header.header_words(tf.float32) + codec.num_words
    payloads = ("float32", [args.num_workers, num_words])
    return {
        "send": (
            send,
            [gradient, gradient, scalar, scalar, *memory],
        ),
        "decode": (decode, [payloads, scalar]),
        "settle": (
            settle,
            [*entries, *sent, scalar, gradient, *memory],
        ),
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    directory = pathlib.Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    index = []
    cells = list(
        itertools.product(map(int, args.sizes), map(float, args.densities))
    )
    for size, density in cells:
        programs = {
            **parts_for(size, density, args),
            **step_for(size, density, args),
        }
        for name in tqdm.tqdm(
            args.programs, desc=f"J={size} density={density:g}"
        ):
            function, arguments = programs[name]
            specs = [tf.TensorSpec(shape, dtype) for dtype, shape in arguments]
            compiled = tf.function(function, jit_compile=True, autograph=False)
            with device_kind.compile_for(args.compile_for):
                ir = compiled.experimental_get_compiler_ir(*specs)
                text = ir(stage="stablehlo")
            file = f"{len(index)}.mlir"
            (directory / file).write_text(text, "utf-8")
            program = {
                "file": file,
                "name": name,
                "size": size,
                "density": density,
                "k": tf_regtopk.TopK(density).num_selected(size),
                "arguments": arguments,
            }
            if name == "settle":
                # Where in the arguments the state begins.
                program["reused"] = 5
            index.append(program)
    text = json.dumps(index, indent=2)
    (directory / "index.json").write_text(text, "utf-8")
    print(f"Wrote {len(index)} programs to {directory}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
