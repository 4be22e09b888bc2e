r"""What a step copies between host and device memory, found without a GPU.

It needs TensorFlow's build for GPUs, not a GPU:

    pip install tensorflow   # and not tensorflow-cpu
    CUDA_VISIBLE_DEVICES= python -m benchmarks.accelerators.host_copies

A step (the gradient of a network, and its update) is traced for two GPUs,
under `MirroredStrategy` and under `MultiWorkerMirroredStrategy` with a second
worker that is not there, and searched for copies: see `device_memory.py`.
Nothing is run or timed. Counted are the copies of a step that is taken; those
of plain Keras SGD are there to compare with. Left out is the watchdog, whose
two counters are on the host. The columns, for the GPU that has most of it:

* "to host", "to GPU", "between GPUs": the bytes of vectors, and how many;
* "flags", "scalars": copies of up to 64 elements and of one, to the host and to
  the GPU;
* "round trips": copies to the host that wait for each other, one after the
  other; "decisions": for how many of these a branch or a check waits;
* "collectives": what the GPU takes part in, and the implementation asked for.
"""

import contextlib
import functools
import json
import os
import re

from absl import app
from absl import flags
from absl import logging
import keras
import tensorflow as tf

# None of these has a public form.
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.eager import context
from tensorflow.python.ops import resource_variable_ops

from benchmarks.accelerators import device_memory
import tf_regtopk
from tf_regtopk.distribute import agreement

_NUM_LAYERS = 8
STRATEGIES = ("mirrored", "workers")


def define_flags():
    flags.DEFINE_integer("size", 25_600_000, "J, about.", lower_bound=1000)
    flags.DEFINE_float("density", 0.01, "k / J.")
    flags.DEFINE_integer("gpus", 2, "GPUs of a worker.", lower_bound=2)
    flags.DEFINE_list("strategies", [*STRATEGIES], "Which of these.")
    flags.DEFINE_list("cases", None, "Some of the optimizers; default all.")
    flags.DEFINE_boolean("list", False, "Whether each copy is listed as well.")
    flags.DEFINE_string("json", None, "A file for all of it.")


def cases(density):
    """Name to function that makes the optimizer, for each way to update."""

    def sparsified(sparsifier=None, **kwargs):
        return lambda: tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            sparsifier or tf_regtopk.RegTopK(density),
            **kwargs,
        )

    return {
        "Keras SGD": lambda: keras.optimizers.SGD(0.1),
        "RegTopK": sparsified(),
        "TopK": sparsified(tf_regtopk.TopK(density)),
        "LearnedShift": sparsified(
            error_feedback=tf_regtopk.LearnedShift(momentum=0.9)
        ),
        "golomb": sparsified(codec=tf_regtopk.Codec("golomb")),
        "dense_below": sparsified(dense_below=10_000),
        "hierarchical": sparsified(hierarchical=True),
        "loss scale": lambda: tf_regtopk.LossScaleOptimizer(sparsified()()),
        "exchange=dense": sparsified(exchange="dense"),
    }


# ----- Tracing -----


def start_as_worker():
    """Makes this process the first of workers that need not be there.

    To be called before TensorFlow has run anything.
    """
    tf.config.set_soft_device_placement(True)  # Onto the CPU.
    cluster = tf.train.ClusterSpec({"worker": ["localhost:0"]})
    context.context().enable_collective_ops(
        tf.train.ServerDef(
            cluster=cluster.as_cluster_def(),
            job_name="worker",
            task_index=0,
            protocol="grpc",
        )
    )


def make_strategy(name, num_gpus):
    """A strategy for GPUs that need not be there, to trace under."""
    if name == "mirrored":
        return tf.distribute.MirroredStrategy(
            [f"GPU:{i}" for i in range(num_gpus)]
        )
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": ["localhost:1", "localhost:2"]}),
        task_type="worker",
        task_id=0,
        num_accelerators={"GPU": num_gpus},
        rpc_layer="grpc",
    )
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    # Else it would wait for the other worker, and ask whether that one lives.
    extended._local_or_standalone_client_mode = True
    extended._enable_check_health = False
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(
        cluster_resolver=resolver, timeout_seconds=None
    )
    # Else the first replica would send initial values to the other worker.
    strategy.extended._get_variable_creator_initial_value = super(
        extended, strategy.extended
    )._get_variable_creator_initial_value
    # Else it would ask the other worker for its arguments.
    agreement.check = lambda describe: None
    return strategy


@contextlib.contextmanager
def variables_on_gpus():
    """Variables say that they are on the GPU of their replica.

    Where there is none they are on the CPU, and so would be what updates them.
    """
    base = resource_variable_ops.BaseResourceVariable
    original = base.device
    base.device = property(lambda variable: gpu_of(variable))
    try:
        yield
    finally:
        base.device = original


def gpu_of(variable):
    """The GPU of a variable, by the name that `tf.distribute` gives it."""
    match = re.search(r"/replica_(\d+)", variable.name)
    return f"/device:GPU:{match.group(1) if match else 0}"


def trace(strategy, make_optimizer, size):
    """The concrete function of a step, and what holds its variables."""
    width = round((size / _NUM_LAYERS) ** 0.5)
    layer = functools.partial(
        keras.layers.Dense, width, kernel_initializer="zeros"
    )
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((width,)), *(layer() for _ in range(_NUM_LAYERS))]
        )
        optimizer = make_optimizer()
        optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step():
        def replica_step():
            with tf.GradientTape() as tape:
                outputs = model(tf.ones([2, width]), training=True)
                loss = optimizer.scale_loss(tf.reduce_mean(outputs**2))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        strategy.run(replica_step)

    with variables_on_gpus():
        return step.get_concrete_function(), (model, optimizer)


# ----- What is found -----


def search(function, host_arguments):
    """A record of what a traced step copies and waits for."""
    graph = function.graph
    variables = {id(v.handle): v for v in graph.variables}

    def memory_of(tensor):
        variable = variables.get(id(tensor))
        if variable is None:
            is_on_host = tensor.dtype == tf.int32
            known = device_memory.HOST if is_on_host else "GPU:0"
            return None if tensor.dtype == tf.resource else known
        if is_on_host_only(variable.dtype, host_arguments):
            return device_memory.HOST
        return gpu_of(variable).removeprefix("/device:")

    # Others are tokens, which order the collectives.
    captured = {id(inside): outside for outside, inside in graph.captures}
    outside = [captured.get(id(tensor), tensor) for tensor in graph.inputs]
    found = device_memory.Graph(
        graph, [memory_of(tensor) for tensor in outside], host_arguments
    )
    return {
        "round_trips": found.round_trips(),
        "decisions": found.decisions(),
        "collectives": {
            device: dict(counts)
            for device, counts in found.collectives().items()
        },
        "host_variables": sorted(
            variable.name
            for variable in graph.variables
            if is_on_host_only(variable.dtype, host_arguments)
        ),
        "copies": [copy.record() for copy in found.copies()],
    }


def is_on_host_only(dtype, host_arguments):
    """Whether TensorFlow keeps variables of a dtype on the host."""
    return host_arguments("VarHandleOp", lambda name: [dtype]) is None


def totals(record):
    """For each GPU `(direction, extent)` to `[number, bytes, is exact]`."""
    sums = {}
    for copy in record["copies"]:
        key = copy["direction"], copy["extent"]
        total = sums.setdefault(copy["gpu"], {}).setdefault(key, [0, 0, True])
        total[0] += 1
        total[1] += copy["bytes"]
        total[2] &= copy["is_exact"]
    return sums


COLUMNS = (
    "strategy, optimizer",
    "to host",
    "to GPU",
    "between GPUs",
    "flags",
    "scalars",
    "round trips",
    "decisions",
    "collectives",
)


def row(record):
    """The cells of a case's row."""
    sums = totals(record).values()

    def most(direction, extent):
        """Of the GPU with most bytes."""
        found = [s.get((direction, extent), [0, 0, True]) for s in sums]
        return max(found, key=lambda total: total[1], default=[0, 0, True])

    def volume(direction):
        number, size, is_exact = most(direction, "vector")
        bound = "" if is_exact else "≤ "
        return f"{bound}{size:,} in {number}" if number else "0"

    def both(extent):
        down, up = (most(way, extent)[0] for way in ("to host", "to GPU"))
        return f"{down} + {up}"

    collectives = record["collectives"].get("GPU:0", {})
    return [
        f"{record['strategy']}, {record['optimizer']}",
        volume("to host"),
        volume("to GPU"),
        volume("between GPUs"),
        both("short"),
        both("scalar"),
        str(record["round_trips"]),
        str(record["decisions"]),
        ", ".join(f"{n} {kind}" for kind, n in collectives.items()) or "none",
    ]


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def print_host_variables(records):
    if on_host := [
        f"{len(record['host_variables'])} of {record['strategy']}, "
        f"{record['optimizer']}"
        for record in records
        if record["host_variables"]
    ]:
        print(
            "\nVariables that TensorFlow keeps on the host, where functions "
            f"compiled for a GPU refuse them: {'; '.join(on_host)}."
        )


def print_copies(record):
    print(f"\n{record['strategy']}, {record['optimizer']}")
    for copy in record["copies"]:
        bound = "" if copy["is_exact"] else "≤ "
        more = len(copy["to"]) - 1
        print(
            f"  {copy['gpu']} {copy['direction']:12} {copy['dtype']:8} "
            f"{bound}{copy['bytes']:,} bytes, shape {copy['shape']}: "
            f"{copy['from']} -> {copy['to'][0]}"
            f"{f' and {more} more' if more else ''}"
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if not tf.test.is_built_with_cuda():
        raise app.UsageError(
            "TensorFlow must be the build for GPUs, whose kernels are looked "
            "up: `pip install tensorflow` instead of tensorflow-cpu. A GPU is "
            "not needed."
        )
    args = flags.FLAGS
    makers = cases(args.density)
    names = args.cases or [*makers]
    if unknown := {*names} - {*makers} | {*args.strategies} - {*STRATEGIES}:
        raise app.UsageError(f"Unknown cases or strategies: {sorted(unknown)}")
    logging.set_verbosity(logging.WARNING)
    start_as_worker()
    registry = device_memory.KernelRegistry()
    print(
        f"J = {args.size:,}, density {args.density:g}, {args.gpus} GPUs a "
        f"worker, TensorFlow {tf.__version__}:\n"
    )
    print_row(COLUMNS)
    print_row(["---", *["---:"] * (len(COLUMNS) - 2), "---"])
    records = []
    for strategy_name in args.strategies:
        for name in names:
            if name == "hierarchical" and strategy_name == "mirrored":
                continue  # One worker has nothing to exchange.
            keras.backend.clear_session()
            strategy = make_strategy(strategy_name, args.gpus)
            function, kept = trace(strategy, makers[name], args.size)
            found = search(function, registry)
            del function, kept
            records.append(
                {"strategy": strategy_name, "optimizer": name, **found}
            )
            print_row(row(records[-1]))
    print_host_variables(records)
    if args.list:
        for record in records:
            print_copies(record)
    if args.json:
        os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(records, f, indent=2)


if __name__ == "__main__":
    define_flags()
    app.run(main)
