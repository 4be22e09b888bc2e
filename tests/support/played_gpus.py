"""Logical CPUs that play GPUs: what TensorFlow keeps on the host stays there.

TensorFlow has kernels for int32 variables in the memory of the host only. On
CPU:1 and CPU:2, which play GPUs, such a variable is put on CPU:0, which plays
the host; and a compiled function refuses variables of another device.
"""

import contextlib

import tensorflow as tf
from tensorflow.python.ops import gen_resource_variable_ops

DEVICES = ("CPU:1", "CPU:2")
HOST_DTYPES = (tf.int32, tf.string, tf.variant)


@contextlib.contextmanager
def host_keeps_its_variables():
    """Variables of int32 made in it lie on the host."""
    original = gen_resource_variable_ops.var_handle_op

    def var_handle_op(dtype, *args, **kwargs):
        is_of_host = tf.as_dtype(dtype) in HOST_DTYPES
        with tf.device("CPU:0") if is_of_host else contextlib.nullcontext():
            return original(dtype, *args, **kwargs)

    gen_resource_variable_ops.var_handle_op = var_handle_op
    try:
        yield
    finally:
        gen_resource_variable_ops.var_handle_op = original


def mirrored_strategy():
    """A strategy of two played GPUs, whose collectives are its own."""

    class OfPlayedGpus(tf.distribute.MirroredStrategy):
        # In a process each group of devices needs keys of its own.
        _collective_key_base = 1000

    return OfPlayedGpus(list(DEVICES))


def crossings(graph):
    """Tensors of host dtypes at the borders of a graph's compiled functions.

    Scalars aside, which cost nothing.

    Args:
        graph: `tf.Graph` of a traced step.

    Returns:
        List of strings: function, direction, dtype and shape of each.
    """
    found = []
    for op in operations(graph):
        if not _is_compiled(op):
            continue
        for direction, tensors in (("in", op.inputs), ("out", op.outputs)):
            found += [
                f"{op.name} {direction}: {tensor.dtype.name}{tensor.shape}"
                for tensor in tensors
                if tensor.dtype in HOST_DTYPES and tensor.shape.rank != 0
            ]
    return found


def compiled_calls(graph):
    """The names of all calls of compiled functions."""
    return [op.name for op in operations(graph) if _is_compiled(op)]


def _is_compiled(op):
    return "_XlaMustCompile" in op.node_def.attr and op.get_attr(
        "_XlaMustCompile"
    )


def operations(graph):
    """All operations, those of branches and functions that it calls as well."""
    for op in graph.get_operations():
        yield op
        if _is_compiled(op):
            continue
        for attribute in op.node_def.attr.values():
            names = [attribute.func.name] if attribute.HasField("func") else []
            names += [f.name for f in attribute.list.func]
            for name in names:
                function = graph._get_function(name)
                if function is not None:
                    yield from operations(function.graph)
