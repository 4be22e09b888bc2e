"""Arrays of the gradient's size: how many a step needs; none is copied."""

import functools
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk import selection
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib

SPARSIFIERS = [tf_regtopk.TopK(0.01), tf_regtopk.RegTopK(0.01)]


def make_optimizer(sparsifier, shapes):
    variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.1), sparsifier
    )
    optimizer.build(variables)
    return optimizer, variables


def copies(function, size, *args):
    """Lines of XLA's final program in which an array of `size` is copied."""
    ir = function.function.experimental_get_compiler_ir(*args)
    program = ir(stage="optimized_hlo")
    assert f"f32[{size}]" in program
    return re.findall(rf"^.*\[{size}\]\S* copy\(.*$", program, re.MULTILINE)


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_no_array_of_the_gradients_size_is_copied(sparsifier):
    """Neither to select, nor to damp scores, nor to clear what was sent."""
    size = 2**18
    optimizer, variables = make_optimizer(sparsifier, [(size - 99,), (9, 11)])
    exchange = optimizer._partition
    local, shared, _ = exchange.feedback_state.variables()
    state = round_lib.State(local, shared, exchange.memory.variables())
    values = tf.nest.map_structure(lambda v: v.read_value(), state)
    progress = error_feedback.Progress(tf.zeros([]), optimizer.iterations.value)
    has_gradient = (True, True)
    weights = tuple(tf.convert_to_tensor(v) for v in variables)
    args = (
        [tf.zeros([size])],
        values,
        progress,
        tf.constant(0),
        has_gradient,
        weights,
    )
    sparse_step = exchange.sparse_step
    assert not copies(sparse_step.send, size, *args)
    payload, _, sent, _, mark = sparse_step.send(*args)
    entries, _ = sparse_step.decode(payload[tf.newaxis], mark)
    args = (entries, sent[:2], state, progress, has_gradient, (), ())
    assert not copies(sparse_step.settle, size, *args)


@pytest.mark.parametrize(
    "k", [2**10, pytest.param(2**17, marks=pytest.mark.slow)]
)
def test_selection_concatenates_no_bitmaps(k):
    """Several threads may take long for it: see `FlatBuffer.vectors`."""
    size = 2**20 + 5
    scores = tf.random.stateless_normal([size], [0, 0])
    select = tf.function(
        lambda s: selection.select_largest(s, [selection.Group(size, k)]),
        jit_compile=True,
    )
    ir = select.experimental_get_compiler_ir(scores)
    program = ir(stage="optimized_hlo")
    words = range(size // 32, size // 32 + 100)
    lengths = re.findall(r" = \w+\[(\d+)\]\S* concatenate\(", program)
    assert " concatenate(" in program
    assert not [n for n in lengths if int(n) in words]


def test_selection_in_groups_has_no_constant_of_their_size():
    groups = [selection.Group(2**18, 200), selection.Group(2**18, 300)]
    size = 2**19
    select = tf.function(
        lambda s, step: selection.select_largest(s, groups, step),
        jit_compile=True,
    )
    ir = select.experimental_get_compiler_ir(tf.zeros([size]), tf.constant(0))
    for stage in ("hlo", "optimized_hlo"):
        constants = re.findall(r"\[([\d,]+)\]\S* constant\(", ir(stage=stage))
        lengths = [np.prod([*map(int, c.split(","))]) for c in constants]
        assert lengths
        assert max(lengths) < size / 100


def test_missing_gradients_are_no_constant_of_their_size():
    """Which TensorFlow would put into the program, and keep with it."""
    size = 2**18
    buffer = flat_buffer.FlatBuffer(((size // 2,),) * 2, (tf.float32,) * 2)
    keep = tf.function(buffer.missing((True, False)).keep, jit_compile=True)
    flat = tf.zeros([size])
    program = keep.experimental_get_compiler_ir(flat, flat)(stage="hlo")
    assert f"[{size}]" in program
    assert not re.findall(rf"\[{size}\]\S* constant\(", program)


def test_several_threads_do_not_concatenate_in_xla(monkeypatch):
    """There TensorFlow does; the step is the same."""
    weights = []
    for num_threads, joins in ((1, 0), (2, 1)):
        monkeypatch.setattr(
            tf.config.threading,
            "get_intra_op_parallelism_threads",
            lambda num_threads=num_threads: num_threads,
        )
        optimizer, variables = make_optimizer(
            tf_regtopk.TopK(0.3), [(9,), (3,), (5,)]
        )
        gradients = [tf.range(9.0), None, 3.0 - tf.range(5.0)]
        step = tf.function(
            functools.partial(optimizer.apply, gradients, variables),
            autograph=False,
        )
        operations = step.get_concrete_function().graph.get_operations()
        concatenated = [
            op.outputs[0].dtype for op in operations if op.type == "ConcatV2"
        ]
        assert concatenated.count(tf.float32) == joins
        step()
        weights.append(np.concatenate(variables))
    np.testing.assert_array_equal(*weights)
    assert np.count_nonzero(weights[0]) == 5


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_a_step_needs_two_arrays_of_the_gradients_size(sparsifier):
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("Needs Linux.")

    def memory(name):
        [kilobytes] = re.findall(
            rf"^{name}:\s+(\d+) kB", status.read_text(), re.M
        )
        return 1024 * int(kilobytes)

    # Large enough that the allocator gives freed arrays back at once.
    size = 12_000_000
    optimizer, variables = make_optimizer(sparsifier, [(size - 1,), (1,)])
    gradients = [tf.random.normal(variable.shape) for variable in variables]
    step = tf.function(
        lambda: optimizer.apply(gradients, variables), autograph=False
    )
    for _ in range(2):
        step()
    # XLA of TensorFlow 2.18 and 2.19 holds an array more.
    num_arrays = 3 if tf.version.VERSION < "2.20" else 2
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
    step()
    assert memory("VmHWM") - before < (num_arrays + 0.5) * 4 * size
    assert memory("VmRSS") - before < 0.5 * 4 * size
