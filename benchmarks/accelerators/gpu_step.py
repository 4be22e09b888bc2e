r"""How long a whole update takes under TensorFlow on GPUs.

    python -m benchmarks.accelerators.gpu_step --budget_seconds=120

A gradient of J floats in 16 variables is given, and the same in each step; a
step is `sparsified.apply` in a `tf.function` under `MirroredStrategy`, from the
gradients to the new weights. Each cell (J, k / J, number of replicas) runs all
methods in turn within each round. A timing is that of a few steps in a row, by
the host's clock, with all devices idle at its ends. One pass is the time to
read and write J floats at the bandwidth of `x + 1`, measured in the same
rounds on an array large enough.

With one GPU two replicas share it, as two logical devices: their exchange then
goes by TensorFlow's ring instead of NCCL, and both compute on one card. The
table says so.

Memory is in units of J floats, on the first device: what a method keeps (its
weights included), and the most that a step needs beyond. The gradient itself
is not part of either. What `tf.math.top_k` returns is not checked; see
`largest.py`.

`summary.json` is written anew after each cell. A method that fails is reported,
and the others go on. When the time of `--budget_seconds` is over, what is left
is named, and not run.
"""

import dataclasses
import gc
import statistics
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging
import keras
import numpy as np
import tensorflow as tf

from benchmarks.accelerators import gpu_utils
import tf_regtopk

PASS = "x + 1"
SELECTION = "tf.math.top_k"
SPARSE = ("RegTopK", "TopK", "LearnedShift")
METHODS = (*SPARSE, "exchange=dense", "Keras SGD", SELECTION)
_NUM_VARIABLES = 16
# Smaller ones take less than it takes to start the program.
_MIN_PASS = 1 << 28


def define_flags():
    flags.DEFINE_list("sizes", ["25600000", "100000000"], "Values of J.")
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_list("replicas", ["1", "2"], "Numbers of replicas.")
    flags.DEFINE_list(
        "methods",
        [m for m in METHODS if m != "LearnedShift"],
        f"Some of: {', '.join(METHODS)}.",
    )
    flags.DEFINE_integer("rounds", 15, "Timed rounds.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 3, "Rounds before those.", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Steps in a timing.", lower_bound=1)
    flags.DEFINE_float(
        "budget_seconds", 120.0, "Nothing is compiled after these."
    )
    flags.DEFINE_enum("device_type", "GPU", ["GPU", "CPU"], "CPU is for tests.")
    flags.DEFINE_integer(
        "memory_mb", None, "Of each part of a GPU that has to be split."
    )
    flags.DEFINE_string("output_dir", "results/gpu_step", "For the results.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of what is measured."""

    size: int
    density: float
    replicas: int

    @property
    def k(self):
        return max(1, round(self.density * self.size))

    def __str__(self):
        return f"J={self.size:,} k/J={self.density:g} N={self.replicas}"


def cells(args):
    """Those most worth knowing first: few entries, then the rest."""
    found = [
        Cell(int(size), float(density), int(replicas))
        for density in args.densities
        for size in args.sizes
        for replicas in args.replicas
    ]
    return list(dict.fromkeys(found))


def variable_sizes(size, number=_NUM_VARIABLES):
    """Sizes that grow, odd but for the last one; of `size` in all."""
    growth = np.geomspace(1, 100, number)
    sizes = [max(1, int(n) - 1 | 1) for n in growth[:-1] / growth.sum() * size]
    return [*sizes, size - sum(sizes)]


# ----- What is timed -----


@dataclasses.dataclass
class Method:
    """A function to time, with what is known of it so far."""

    run: Any
    kept_bytes: int | None = None
    step_bytes: int | None = None
    first_seconds: float | None = None
    seconds: list = dataclasses.field(default_factory=list)


def make_gradients(strategy, sizes):
    """Each replica's own, on its device; layers differ in scale."""

    @tf.function
    def normal():
        replica = tf.distribute.get_replica_context()
        seed = tf.convert_to_tensor(replica.replica_id_in_sync_group)
        return [
            tf.random.stateless_normal([n], [slot, seed]) * np.exp(slot % 5 - 2)
            for slot, n in enumerate(sizes)
        ]

    return strategy.run(normal)


def make_optimizer(name, density):
    inner = keras.optimizers.SGD(0.01)
    if name == "Keras SGD":
        return inner
    if name == "exchange=dense":
        return tf_regtopk.SparsifiedOptimizer(inner, exchange="dense")
    rule = tf_regtopk.Accumulate()
    if name == "LearnedShift":
        rule = tf_regtopk.LearnedShift(momentum=0.9)
    sparsifier = tf_regtopk.TopK if name == "TopK" else tf_regtopk.RegTopK
    return tf_regtopk.SparsifiedOptimizer(
        inner, sparsifier(density), error_feedback=rule
    )


def make_update(name, cell, strategy, gradients):
    """A function that takes a step."""
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(n, np.float32))
            for n in variable_sizes(cell.size)
        ]
        optimizer = make_optimizer(name, cell.density)
        optimizer.build(variables)

    def replica_update(gradients):
        # Arguments of a graph are on no device, which an all-reduce asks for.
        gradients = [tf.identity(gradient) for gradient in gradients]
        optimizer.apply(gradients, variables)

    @tf.function(autograph=False)
    def update(gradients):
        strategy.run(replica_update, args=(gradients,))

    return lambda: update(gradients)


def make_selection(cell, device):
    """The k largest of J magnitudes, as XLA finds them."""
    with tf.device(device):
        magnitudes = tf.abs(tf.random.stateless_normal([cell.size], [0, 1]))

    @tf.function(jit_compile=True)
    def select(magnitudes):
        return tf.math.top_k(magnitudes, cell.k, sorted=False)[1]

    def run():
        with tf.device(device):
            select(magnitudes)

    return run


def make_pass(size, device):
    """Reads and writes an array; returns its size as well."""
    if device.startswith("GPU"):
        size = max(size, _MIN_PASS)
    with tf.device(device):
        array = tf.zeros([size])
    add_one = tf.function(lambda x: x + 1, jit_compile=True)

    def run():
        with tf.device(device):
            add_one(array)

    return run, size


# ----- Timing -----


def seconds_of(run, steps):
    """Seconds a step, of some in a row."""
    gpu_utils.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    gpu_utils.synchronize()
    return (time.perf_counter() - start) / steps


def first_call(make, device):
    """A `Method` that has run twice: its first call, and its memory."""
    before = gpu_utils.memory_in_use(device)
    method = Method(make())
    method.first_seconds = seconds_of(method.run, 1)
    if before:
        kept, _ = gpu_utils.memory_in_use(device, reset=True)
        seconds_of(method.run, 1)
        _, peak = gpu_utils.memory_in_use(device)
        method.kept_bytes = kept - before[0]
        method.step_bytes = peak - kept
    return method


def measure(cell, names, strategy, device, deadline, args):
    """What came of a cell.

    Returns:
        `(records, failures, left)`: a record for each method that ran, the
        messages of those that failed, and the names of those left out.
    """
    gradients = make_gradients(strategy, variable_sizes(cell.size))
    add_one, pass_size = make_pass(cell.size, device)
    methods, failures, left = (
        {PASS: first_call(lambda: add_one, device)},
        {},
        [],
    )
    for name in names:
        if time.monotonic() > deadline:
            left.append(name)
            continue

        def make(name=name):
            if name == SELECTION:
                return make_selection(cell, device)
            return make_update(name, cell, strategy, gradients)

        try:
            methods[name] = first_call(make, device)
        except (tf.errors.OpError, RuntimeError, ValueError) as e:
            failures[name] = f"{type(e).__name__}: {str(e)[:500]}"
    for r in range(args.warm_up + args.rounds):
        if r > args.warm_up + 2 and time.monotonic() > deadline:
            break
        for method in methods.values():
            seconds = seconds_of(method.run, args.steps)
            if r >= args.warm_up:
                method.seconds.append(seconds)
    one_pass = statistics.median(methods[PASS].seconds) * cell.size / pass_size
    records = [
        record(cell, name, method, one_pass) for name, method in methods.items()
    ]
    return records, failures, left


def record(cell, name, method, one_pass):
    """What is kept of a method's timings.

    `one_pass` is the seconds of a pass over J floats.
    """
    seconds = method.seconds
    if name == PASS:  # Its array is another one.
        scale = one_pass / statistics.median(seconds)
        seconds = [scale * s for s in seconds]

    def in_arrays(num_bytes):
        return None if num_bytes is None else num_bytes / (4 * cell.size)

    return {
        **dataclasses.asdict(cell),
        "method": name,
        "milliseconds": 1e3 * statistics.median(seconds),
        "passes": statistics.median(seconds) / one_pass,
        "passes_10_to_90_percent": [
            float(p) / one_pass for p in np.percentile(seconds, [10, 90])
        ],
        "rounds": len(seconds),
        "first_call_seconds": method.first_seconds,
        "kept_arrays": in_arrays(method.kept_bytes),
        "step_arrays": in_arrays(method.step_bytes),
    }


# ----- The report -----

HEADER = (
    f"{'method':20} {'ms':>9} {'passes':>7}  {'10-90 %':>13} {'first s':>8} "
    f"{'kept J':>7} {'step J':>7}"
)


def line(r):
    low, high = r["passes_10_to_90_percent"]
    kept, step = (
        "-" if r[key] is None else f"{r[key]:.2f}"
        for key in ("kept_arrays", "step_arrays")
    )
    return (
        f"{r['method']:20} {r['milliseconds']:9.3f} {r['passes']:7.2f}  "
        f"{low:6.2f}-{high:<6.2f} {r['first_call_seconds']:8.2f} {kept:>7} "
        f"{step:>7}"
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    if unknown := {*args.methods} - {*METHODS}:
        raise app.UsageError(f"Unknown methods: {sorted(unknown)}")
    logging.set_verbosity(logging.WARNING)
    deadline = time.monotonic() + args.budget_seconds
    devices = gpu_utils.replica_devices(
        args.device_type, max(map(int, args.replicas)), args.memory_mb
    )
    # One for all, as TensorFlow's collectives ask for.
    strategies = {
        int(n): tf.distribute.MirroredStrategy(devices[: int(n)])
        for n in args.replicas
    }
    results = {
        "machine": gpu_utils.machine(),
        "results": [],
        "failures": {},
        "left": [],
    }
    print(results["machine"])
    for cell in cells(args):
        if time.monotonic() > deadline:
            results["left"].append(str(cell))
            continue
        setting = gpu_utils.describe(devices[: cell.replicas])
        records, failures, left = measure(
            cell,
            args.methods,
            strategies[cell.replicas],
            devices[0],
            deadline,
            args,
        )
        for r in records:
            r["setting"] = setting
        results["results"] += records
        print(f"\n{cell}, {setting}\n{HEADER}")
        for r in records:
            print(line(r))
        for name, message in failures.items():
            print(f"{name} FAILED: {message}")
            results["failures"][f"{cell}, {name}"] = message
        results["left"] += [f"{cell}, {name}" for name in left]
        print(end="", flush=True)
        gpu_utils.write(args.output_dir, results)
        keras.backend.clear_session()
        gc.collect()
    print(f"Left, for want of time: {results['left'] or 'nothing'}.")
    print(f"Wrote {gpu_utils.write(args.output_dir, results)}.")
    return bool(results["failures"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
