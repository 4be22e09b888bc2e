"""Which tensors of a traced step cross between host and device memory.

A kernel for GPUs takes some of its arguments from the memory of the host, and
leaves some results there: all int32 ones, and what a shape or a branch depends
on. The registry of kernels says which. So a graph, and the device of each of
its operations, tell what has to be copied; nothing is run.

Branches and functions are gone through as TensorFlow does: functions are
inlined, and `tf.cond` becomes a Switch for each of its inputs. What XLA
compiles takes and returns everything in device memory. What depends on
constants alone is one, as Grappler makes of it. Not known here: what else
Grappler simplifies, which arguments XLA needs as constants (their copies are
counted, but go the other way), and what a collective itself moves.
"""

import collections
import dataclasses
import math
import re

import tensorflow as tf
from tensorflow.python.framework import kernels  # No public way to the list.

HOST = "host"
# These are references, or never leave the host.
_IMMOBILE = (tf.resource, tf.variant, tf.string)
# Up to so many elements a vector is one of flags, and costs what a scalar does.
SHORT = 64


class KernelRegistry:
    """What this build of TensorFlow says of its kernels for GPUs."""

    def __init__(self):
        self._kernels = {}

    def __call__(self, kind, dtypes_of):
        """The arguments that live in host memory.

        Args:
            kind: Name of the operation.
            dtypes_of: Function from the name of an attribute to its dtypes.

        Returns:
            Set of names of inputs and outputs, or None if there is no kernel
            for GPUs: soft placement then takes the one for CPUs.
        """
        if kind not in self._kernels:
            found = kernels.get_registered_kernels_for_op(kind).kernel
            self._kernels[kind] = [
                kernel
                for device in ("GPU", "DEFAULT")  # In order of precedence.
                for kernel in sorted(found, key=lambda k: -k.priority)
                if kernel.device_type == device and not kernel.label
            ]
        for kernel in self._kernels[kind]:
            if all(
                {dtype.as_datatype_enum for dtype in dtypes_of(constraint.name)}
                <= {*constraint.allowed_values.list.type}
                for constraint in kernel.constraint
            ):
                return {*kernel.host_memory_arg}
        return None


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor: its node (None outside), and where it is.

    `memory` is `HOST` or a device; of a reference to a variable, where the
    variable is, or None for other references. `size` is an upper bound where
    the shape is not known, and `shape` then None. `whole` is the `id` of what
    it is a part of.
    """

    node: "Node"
    dtype: tf.DType
    shape: tuple
    size: int
    memory: str
    whole: int = 0

    @property
    def is_constant(self):
        return self.node is not None and self.node.kind == "Const"

    @property
    def extent(self):
        """`"scalar"`, `"short"` or `"vector"`."""
        if self.size == 1:
            return "scalar"
        return "short" if self.size <= SHORT else "vector"


@dataclasses.dataclass(eq=False)
class Node:
    """An operation that runs.

    `is_regular` says whether every step runs it: a predicate is expected to be
    true. `round_trips` is how many copies to the host wait for each other
    before it has run, `decisions` for how many of these a branch or a check
    waits, and `decided` the last of them.
    """

    kind: str
    name: str
    device: str
    inputs: list  # Of `(value, memory it is needed in)`.
    after: list
    is_regular: bool
    hint: str = ""
    round_trips: int = 0
    decisions: int = 0
    decided: int = 0

    def __post_init__(self):
        before = [value.node for value, _ in self.inputs if value.node]
        before += self.after
        self.decisions = max((node.decisions for node in before), default=0)
        self.decided = max((node.decided for node in before), default=0)
        self.round_trips = max((node.round_trips for node in before), default=0)
        for value, memory in self.inputs:
            if is_copied(value, memory) and memory == HOST:
                trips = value.node.round_trips if value.node else 0
                self.round_trips = max(self.round_trips, trips + 1)
        if self.kind in ("If", "Assert"):
            predicate, memory = self.inputs[0]
            trips = predicate.node.round_trips if predicate.node else 0
            trips += is_copied(predicate, memory)
            self.decisions += trips > self.decided
            self.decided = max(self.decided, trips)


def is_copied(value, memory):
    return value.dtype not in _IMMOBILE and value.memory != memory


@dataclasses.dataclass
class Copy:
    """A tensor that is copied; once, however many need it there."""

    value: Value
    destination: str
    consumers: list

    @property
    def direction(self):
        if self.destination == HOST:
            return "to host"
        return "to GPU" if self.value.memory == HOST else "between GPUs"

    @property
    def gpu(self):
        source = self.value.memory
        return self.destination if source == HOST else source

    @property
    def bytes(self):
        return self.value.size * self.value.dtype.size

    def record(self):
        value = self.value
        return {
            "direction": self.direction,
            "gpu": self.gpu,
            "extent": value.extent,
            "dtype": value.dtype.name,
            "shape": None if value.shape is None else list(value.shape),
            "bytes": self.bytes,
            "is_exact": value.shape is not None,
            "from": _label(value.node),
            "to": [_label(node) for node in self.consumers],
        }


def _label(node):
    return f"{node.kind} {node.name}" if node else "argument"


class Graph:
    """What runs when a traced function is called.

    Args:
        graph: A `FuncGraph`, the `graph` of a concrete function.
        captures: For each of the graph's inputs the memory that it, or for a
            resource its variable, is in; or None.
        host_arguments: As of `KernelRegistry`.
    """

    def __init__(self, graph, captures, host_arguments):
        self.nodes = []
        self._host_arguments = host_arguments
        arguments = [
            self._value(None, tensor, memory, ())
            for tensor, memory in zip(graph.inputs, captures, strict=True)
        ]
        self._add_function(graph, arguments, [], True)

    def copies(self):
        """List of `Copy`: what a step copies."""
        found = {}
        for node in self.nodes:
            for value, memory in node.inputs:
                if node.is_regular and is_copied(value, memory):
                    key = id(value), memory
                    copy = found.setdefault(key, Copy(value, memory, []))
                    copy.consumers.append(node)
        return [*found.values()]

    def collectives(self):
        """For each device a `Counter` of the collectives of a step."""
        counts = collections.defaultdict(collections.Counter)
        for node in self.nodes:
            is_one = re.match("Collective|Nccl", node.kind)
            if is_one and node.is_regular:
                hint = f" ({node.hint})" if node.hint else ""
                counts[node.device][node.kind + hint] += 1
        return counts

    def round_trips(self):
        return max(n.round_trips for n in self.nodes if n.is_regular)

    def decisions(self):
        return max(n.decisions for n in self.nodes if n.is_regular)

    # ----- Going through -----

    def _add_function(self, graph, arguments, after, is_regular):
        """Adds the nodes of a graph, and returns the values of its outputs."""
        values, made = {}, {}
        for tensor, value in zip(graph.inputs, arguments, strict=True):
            values[tensor.name] = value
        for op in graph.get_operations():
            if op.outputs and op.outputs[0].name in values:
                continue
            inputs = [values[tensor.name] for tensor in op.inputs]
            before = [*after]
            for other in op.control_inputs:
                before += made.get(other.name, ())
            start = len(self.nodes)
            outputs = self._add(op, inputs, before, is_regular)
            made[op.name] = self.nodes[start:]
            for tensor, value in zip(op.outputs, outputs, strict=True):
                values[tensor.name] = value
        return [values[tensor.name] for tensor in graph.outputs]

    def _add(self, op, inputs, after, is_regular):
        """Adds what an operation comes to; returns the values it makes."""
        if op.type in ("If", "StatelessIf"):
            return self._add_branches(op, inputs, after, is_regular)
        if op.type in ("While", "StatelessWhile"):
            raise ValueError(
                "A step must have no loop outside of XLA, because nobody "
                f"knows how often it turns. Received: {op.name}"
            )
        if op.type not in ("PartitionedCall", "StatefulPartitionedCall"):
            return self._add_kernel(op, inputs, after, is_regular)
        if "_XlaMustCompile" not in op.node_def.attr or not op.get_attr(
            "_XlaMustCompile"
        ):
            function = _function(op, "f")
            return self._add_function(function, inputs, after, is_regular)
        device = self._device_of(op, [])
        node = self._node(
            op,
            device,
            [(value, device) for value in inputs],
            after,
            is_regular,
            kind="XLA",
        )
        return [
            self._value(node, tensor, device, inputs) for tensor in op.outputs
        ]

    def _add_kernel(self, op, inputs, after, is_regular):
        device = self._device_of(op, inputs)
        if (
            inputs
            and op.outputs
            and not op.op_def.is_stateful
            and all(value.is_constant for value in inputs)
        ):
            node = self._node(op, device, [], after, is_regular, kind="Const")
            return [
                self._value(
                    node,
                    tensor,
                    self._memory("Const", "output", tensor.dtype, device),
                    inputs,
                )
                for tensor in op.outputs
            ]
        on_host = None
        if device != HOST:
            on_host = self._host_arguments(
                op.type, lambda name: _as_list(op.get_attr(name))
            )
        if on_host is None:
            device, on_host = HOST, set()

        def memories(arguments):
            return [
                HOST if name in on_host else device
                for argument in arguments
                for name in [argument.name] * _length(op, argument)
            ]

        needed = zip(inputs, memories(op.op_def.input_arg), strict=True)
        node = self._node(op, device, [*needed], after, is_regular)
        outputs = zip(op.outputs, memories(op.op_def.output_arg), strict=True)
        return [
            self._value(node, tensor, memory, inputs)
            for tensor, memory in outputs
        ]

    def _add_branches(self, op, inputs, after, is_regular):
        """A Switch for each input, where it is; both branches; the Merges."""
        predicate, *inputs = inputs
        device = self._device_of(op, [])
        needed = [(predicate, HOST)]
        pivot = self._node(op, device, needed, after, is_regular, kind="If")
        switched = [
            self._switch(op, value, predicate, pivot) for value in inputs
        ]
        results = [
            self._add_function(
                _function(op, branch),
                switched,
                [pivot],
                is_regular and branch == "then_branch",
            )
            for branch in ("then_branch", "else_branch")
        ]
        outputs = []
        for tensor, *values in zip(op.outputs, *results, strict=True):
            memory = self._memory("Merge", "output", tensor.dtype, device)
            # What is chosen is there as soon as the regular branch is done.
            node = self._node(
                op,
                device,
                [(values[0], memory)],
                [pivot],
                is_regular,
                kind="Merge",
            )
            outputs.append(self._value(node, tensor, memory, values))
        return outputs

    def _switch(self, op, value, predicate, pivot):
        if value.dtype in _IMMOBILE or value.memory == HOST:
            return value
        device = value.memory
        memory = self._memory("Switch", "data", value.dtype, device)
        node = self._node(
            op,
            device,
            [(value, memory), (predicate, HOST)],
            [pivot],
            pivot.is_regular,
            kind="Switch",
        )
        return dataclasses.replace(value, node=node, memory=memory)

    def _memory(self, kind, argument, dtype, device):
        """Where an argument of a node that the graph does not hold is."""
        if device == HOST:
            return HOST
        on_host = self._host_arguments(kind, lambda name: [dtype])
        return HOST if on_host is None or argument in on_host else device

    def _node(self, op, device, needed, after, is_regular, kind=None):
        hint = ""
        if "communication_hint" in op.node_def.attr:
            hint = op.get_attr("communication_hint").decode()
        node = Node(
            kind or op.type, op.name, device, needed, after, is_regular, hint
        )
        self.nodes.append(node)
        return node

    def _value(self, node, tensor, memory, inputs):
        shape = tensor.shape
        if shape.is_fully_defined():
            shape = tuple(shape)
            return Value(node, tensor.dtype, shape, math.prod(shape), memory)
        size, whole = _bound(node, tensor, inputs)
        return Value(node, tensor.dtype, None, size, memory, whole)

    def _device_of(self, op, inputs):
        """The device that the program or the placer chooses."""
        for value in inputs:
            if value.dtype == tf.resource and value.memory == HOST:
                return HOST
        if match := re.search(r"GPU:\d+", op.device):
            return match.group()
        if "CPU:" in op.device:
            return HOST
        for value in inputs:
            if value.dtype == tf.resource and value.memory:
                return value.memory
        return "GPU:0"


def _function(op, attribute):
    # No public way to the functions that a graph holds.
    return op.graph._get_function(op.get_attr(attribute).name).graph


def _bound(node, tensor, inputs):
    """`(size, whole)` of a tensor whose shape is not known."""
    kind = node.kind if node else ""
    if not inputs:
        return 0, 0
    if kind == "CollectiveGatherV2":
        group_size = int(tf.get_static_value(tensor.op.inputs[1]))
        return inputs[0].size * group_size, 0
    if kind in ("ConcatV2", "Pack", "XLA"):
        # The parts of a whole are together no longer than the whole.
        wholes = {value.whole or id(value): value.size for value in inputs}
        return sum(wholes.values()), 0
    # Of a slice, or what only moves the entries.
    first = inputs[tensor.value_index if kind == "IdentityN" else 0]
    return first.size, first.whole or id(first)


def _length(op, argument):
    """How many tensors an argument of an operation stands for."""
    if argument.number_attr:
        return op.get_attr(argument.number_attr)
    if argument.type_list_attr:
        return len(op.get_attr(argument.type_list_attr))
    return 1


def _as_list(value):
    return value if isinstance(value, list) else [value]
