"""What crosses between host and device memory, found in a traced graph."""

import json

import fork_server
import paths
import pytest
import tensorflow as tf

from benchmarks.accelerators import device_memory
from benchmarks.accelerators import host_copies

# What is on the host as well if it is int32.
OF_INTEGERS = {
    "ConcatV2": {"values", "output"},
    "Equal": {"x", "y", "z"},
    "Greater": {"x", "y", "z"},
    "Identity": {"input", "output"},
    "Pad": {"input", "output"},
    "Reshape": {"tensor", "output"},
    "StridedSlice": {"input", "output"},
    "Switch": {"data"},
}


def host_arguments(kind, dtypes_of):
    """Plays the registry of a build for GPUs."""
    if kind == "VarHandleOp":
        return None if dtypes_of("dtype") == [tf.int32] else {"resource"}
    if kind == "Const":
        return {"output"} if dtypes_of("dtype") == [tf.int32] else set()
    if kind == "NextAfter":
        return None
    on_host = {
        "All": {"reduction_indices"},
        "Assert": {"condition", "data"},
        "Reshape": {"shape"},
        "Switch": {"pred"},
    }.get(kind, set())
    if kind in OF_INTEGERS and dtypes_of("T") == [tf.int32]:
        on_host |= OF_INTEGERS[kind]
    return on_host


def search(function, *shapes):
    function = tf.function(function, autograph=False)
    args = [tf.TensorSpec(shape) for shape in shapes]
    graph = function.get_concrete_function(*args).graph
    return device_memory.Graph(
        graph, ["GPU:0"] * len(graph.inputs), host_arguments
    )


def copies(graph):
    return [
        (c.direction, c.value.dtype.name, c.value.shape) for c in graph.copies()
    ]


def to_bits(x):
    compiled = tf.function(
        lambda x: (tf.bitcast(x, tf.int32), x + 1), jit_compile=True
    )
    return compiled(x)


def test_integers_of_compiled_functions_are_copied():
    def step(x):
        bits, y = to_bits(x)
        # Two that need the integers on the host, one copy.
        a, b = tf.reshape(bits, [-1]), tf.identity(bits)
        return a, b, tf.reshape(y, [-1])

    graph = search(step, [2, 3])
    assert copies(graph) == [("to host", "int32", (2, 3))]
    assert graph.round_trips() == 1
    assert graph.decisions() == 0

    def and_back(x):
        bits, _ = to_bits(x)
        return to_bits(tf.bitcast(tf.reshape(bits, [-1]), tf.float32))[1]

    graph = search(and_back, [2, 3])
    assert copies(graph) == [
        ("to host", "int32", (2, 3)),
        ("to GPU", "int32", (6,)),
    ]


def test_without_a_kernel_for_gpus_all_is_on_the_host():
    graph = search(lambda x: tf.math.nextafter(x, x) * 2, [5])
    assert copies(graph) == [
        ("to host", "float32", (5,)),
        ("to GPU", "float32", (5,)),
    ]


def test_what_depends_on_constants_is_one():
    def step(x):
        return tf.reshape(x, tf.identity([4, 2]) + 0)

    assert copies(search(step, [8])) == []


def test_decisions_wait_for_each_other():
    """Only what a step runs counts that is taken."""

    def step(x):
        is_finite = tf.reduce_all(tf.math.is_finite(x))
        checked = tf.debugging.Assert(is_finite, [tf.constant(["not finite"])])
        with tf.control_dependencies([checked]):
            is_positive = tf.reduce_all(x > 0)

        def skip():
            return tf.math.nextafter(x, x)

        return tf.cond(is_positive, lambda: x + 1, skip)

    graph = search(step, [5])
    assert copies(graph) == [("to host", "bool", ())] * 2
    assert graph.decisions() == graph.round_trips() == 2
    assert {c.value.extent for c in graph.copies()} == {"scalar"}


def test_decisions_may_wait_for_one_copy():
    def step(x):
        flags, _ = to_bits(x)
        checked = tf.debugging.Assert(flags[0] > 0, [tf.constant(["negative"])])
        with tf.control_dependencies([checked]):
            return tf.cond(flags[1] > 0, lambda: x + 1, lambda: x)

    graph = search(step, [2])
    assert graph.round_trips() == graph.decisions() == 1


def test_of_an_unknown_shape_there_is_a_bound():
    def step(x):
        length = tf.cast(x[0], tf.int32)
        bits, _ = to_bits(x)
        part = tf.identity(tf.identity(bits)[:length])
        return to_bits(tf.bitcast(part, tf.float32))[1]

    [*_, back] = search(step, [100]).copies()
    assert (back.value.shape, back.bytes) == (None, 400)
    assert back.record()["is_exact"] is False


def test_variables_on_the_host():
    int32, float32 = tf.Variable([1, 2]), tf.Variable([1.0, 2.0])

    def step():
        return tf.bitcast(int32.read_value(), tf.float32) + float32.read_value()

    function = tf.function(step).get_concrete_function()
    record = host_copies.search(function, host_arguments)
    assert record["host_variables"] == [int32.name]
    [copy] = record["copies"]
    assert (copy["direction"], copy["dtype"]) == ("to GPU", "int32")


# ----- Steps -----


# In a process of its own, because of what it changes in TensorFlow.
PATHS = [paths.ROOT, paths.TESTS / "integration", paths.TESTS / "support"]
PROGRAM = f"""
import json, sys
sys.path[:0] = {[str(path) for path in PATHS]}
import test_host_copies
from benchmarks.accelerators import host_copies
host_copies.start_as_worker()
makers = host_copies.cases(density=0.1)
records = []
for strategy, optimizer in json.loads(sys.argv[1]):
    function, kept = host_copies.trace(
        host_copies.make_strategy(strategy, 2), makers[optimizer], 2000
    )
    found = host_copies.search(function, test_host_copies.host_arguments)
    records.append({{"strategy": strategy, "optimizer": optimizer, **found}})
print(json.dumps(records))
"""
TRACED = [
    ("mirrored", "Keras SGD"),
    ("mirrored", "exchange=dense"),
    ("mirrored", "TopK"),
    ("workers", "TopK"),
    ("workers", "hierarchical"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    program = tmp_path_factory.mktemp("traced") / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    result = fork_server.run_one(program, [json.dumps(TRACED)])
    assert result.returncode == 0, result.stderr
    return dict(zip(TRACED, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("name", ["Keras SGD", "exchange=dense"])
def test_dense_steps_copy_no_vectors(records, name):
    """As they would if variables counted as the CPU's, where they are."""
    record = records["mirrored", name]
    assert "vector" not in {copy["extent"] for copy in record["copies"]}
    counts = record["collectives"]
    assert {*counts} == {"GPU:0", "GPU:1"}
    for collectives in counts.values():
        assert [*collectives.values()] == [1]
    assert bool(record["decisions"]) == (name == "exchange=dense")


@pytest.mark.parametrize("traced", TRACED[2:])
def test_sparse_steps_copy_no_vectors(records, traced):
    """Words of payloads and indices are no int32 outside of XLA."""
    record = records[traced]
    assert "vector" not in {copy["extent"] for copy in record["copies"]}
    assert record["host_variables"] == []
    assert record["round_trips"] == record["decisions"] == 1
    for sums in host_copies.totals(record).values():
        [flags] = [n for (way, _), n in sums.items() if way == "to host"]
        assert flags[0] == 1


def test_report_of_a_step(records, capsys):
    record = records["mirrored", "TopK"]
    assert {*host_copies.totals(record)} == {"GPU:0", "GPU:1"}
    assert len(host_copies.row(record)) == len(host_copies.COLUMNS)
    host_copies.print_copies(record)
    listed = capsys.readouterr().out.splitlines()[2:]
    assert len(listed) == len(record["copies"])
    assert all(line.startswith("  GPU:") for line in listed)


def test_a_worker_alone_can_be_traced(records):
    """With all collectives, and without the other one."""
    every = records["workers", "TopK"]["collectives"]
    groups = records["workers", "hierarchical"]["collectives"]
    for collectives in (every, groups):
        assert {*collectives} == {"GPU:0", "GPU:1"}
    assert "CollectiveReduceV2 (auto)" not in every["GPU:0"]
    assert groups["GPU:0"]["CollectiveReduceV2 (auto)"] == 1


def test_the_script_asks_for_the_build_for_gpus():
    result = fork_server.run_one(
        "benchmarks.accelerators.host_copies",
        ["--size=2000", "--cases=TopK", "--strategies=workers"],
    )
    if tf.test.is_built_with_cuda():
        assert "| workers, TopK |" in result.stdout
    else:
        assert result.returncode
        assert "must be the build for GPUs" in result.stdout + result.stderr
