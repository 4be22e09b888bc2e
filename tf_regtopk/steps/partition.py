"""The partition of the variables by the way their gradients are exchanged."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ownership
from tf_regtopk.kernels import tracing
from tf_regtopk.saving import saved_state
from tf_regtopk.steps import dense_step
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import scattered_step
from tf_regtopk.steps import sparse_step
from tf_regtopk.steps import telemetry
from tf_regtopk.steps import variable_rules
from tf_regtopk.steps import verdict
from tf_regtopk.steps import weight_mark

# "all_gather" sends the entries to all where the topology sends them to owners.
Exchange: TypeAlias = Literal["sparse", "all_gather", "dense"]
# Those that users can ask for.
EXCHANGES: tuple[Exchange, ...] = ("sparse", "dense")

# The slots of some variables, the step by which they are exchanged, its state.
_Part: TypeAlias = tuple[
    tuple[int, ...],
    dense_step.PlainStep | dense_step.DenseStep | sparse_step.SparseStep,
    round_lib.State,
]


def candidates(topology_: topology.Topology) -> tuple[Exchange, ...]:
    """The exchanges of which `exchange="auto"` chooses one.

    Args:
        topology_: `Topology` of the optimizer.

    Example:

    >>> candidates(topology.AllGather())
    ('sparse', 'dense')
    >>> candidates(reduce_scatter.ReduceScatter())
    ('sparse', 'all_gather', 'dense')
    """
    if isinstance(topology_, reduce_scatter.ReduceScatter):
        return ("sparse", "all_gather", "dense")
    return EXCHANGES


class Choices(NamedTuple):
    """The parts of a step that the user has chosen.

    Args:
        sparsifier: `Sparsifier`.
        codec: `Codec`.
        error_feedback: `ErrorFeedback`.
        scope: `"global"` or `"per_variable"`.
        rules: `VariableRules`: which variables are exchanged otherwise.
        telemetry: Whether the numbers of `telemetry` are computed; `"ages"` for
            those of ages as well.
    """

    sparsifier: sparsifiers.Sparsifier
    codec: codecs.Codec
    error_feedback: error_feedback_lib.ErrorFeedback
    scope: flat_buffer.Scope
    rules: variable_rules.VariableRules
    telemetry: bool | Literal["ages"]


class Partition:
    """The variables that are exchanged in each way, and what is kept for it.

    To be created in the scope of the strategy.

    Args:
        kind: `"sparse"`, `"all_gather"` or `"dense"`.
        variables: List of the trainable variables.
        participants: `topology.Participants`; by `"all_gather"` they exchange
            as its `ReduceScatter.gathering` says.
        choices: `Choices`.
    """

    def __init__(
        self,
        kind: Exchange,
        variables: Sequence[keras.Variable],
        participants: topology.Participants,
        choices: Choices,
    ) -> None:
        self.kind = kind
        if kind != "dense":
            device_kind.warn_of_serial_scatters()
        if kind == "all_gather":
            assert isinstance(
                participants.topology, reduce_scatter.ReduceScatter
            )
            participants = topology.Participants(
                participants.topology.gathering
            )
        self._participants = participants
        self._choices = choices
        self._sampled = weight_mark.sample(variables)
        self._dense_rule = _rule_when_dense(choices.error_feedback)
        self._slots = (
            choices.rules.slots(variables)
            if kind != "dense"
            else _all_dense(variables)
        )
        sparse, _, dense = self._slots
        self._sparse_variables = [variables[slot] for slot in sparse]
        self._dense_variables = [variables[slot] for slot in dense]
        self._buffer = flat_buffer.FlatBuffer.for_variables(
            self._sparse_variables
        )
        self._dense_step: dense_step.PlainStep | dense_step.DenseStep = (
            dense_step.PlainStep()
        )
        # The variables that have error-feedback state.
        self.variables = self._sparse_variables
        if self._dense_rule != error_feedback_lib.NoFeedback():
            self.variables = [*self._sparse_variables, *self._dense_variables]
            self._dense_step = tracing.of_equal(
                dense_step.DenseStep,
                flat_buffer.FlatBuffer.for_variables(self._dense_variables),
                self._dense_rule,
                participants.cluster.num_replicas,
            )
        self.feedback_state = replica_state.ReplicaState(
            self._initial_feedback, participants
        )
        self.measured = replica_state.ReplicaState(
            self._initial_measured, participants
        )
        self._steps: dict[float, sparse_step.SparseStep] = {}
        # The sparsifier's own.
        self.default_density = choices.sparsifier.density_of(
            self._buffer.first(self._slots.num_default).size
        )
        self.start_with(self.default_density)

    def start_with(self, density: float) -> None:
        """Sets the share of the entries to send, and forgets the memory."""
        self.density = density
        self.memory = replica_state.ReplicaState(
            lambda: self.initial_memory(density), self._participants
        )
        # Steps are kept, because TensorFlow never frees a compiled program.
        if density not in self._steps:
            self._steps[density] = self._step_at(density)
        self.sparse_step = self._steps[density]

    def _step_at(self, density: float) -> sparse_step.SparseStep:
        # Indices are not compressed for a single participant, because nothing
        # is sent.
        codec = self._choices.codec
        if self._participants.count == 1:
            codec = dataclasses.replace(codec, indices="int32")
        local, shared, _ = self.feedback_state.dtypes
        payload_codec = self._payload_codec_of(codec)
        step = (
            scattered_step.ScatteredStep
            if isinstance(payload_codec, codecs.ScatteredCodec)
            else sparse_step.SparseStep
        )
        return tracing.of_equal(
            step,
            self._buffer,
            round_lib.Method(
                self._choices.sparsifier,
                self._choices.error_feedback,
                # None, because no step is taken, where nothing is selected.
                payload_codec,  # type: ignore[arg-type]
                self._groups_at(density),
            ),
            self._participants,
            round_lib.State(
                local, shared, self.memory.dtypes, self.measured.dtypes
            ),
        )

    def exchange(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        moment: error_feedback_lib.Moment,
    ) -> tuple[list[verdict.Flags], tuple[Any, ...]]:
        """The first half of a step; nothing is kept yet.

        Args:
            gradients: For each variable this replica's gradient or None.
            moment: `error_feedback.Moment`.

        Returns:
            `(flags, exchanged)`: list of `verdict.Flags`, and for `aggregate` a
            structure of tensors.
        """
        exchanged: list[tuple[Any, ...]] = []
        flags: list[verdict.Flags] = []
        for slots, step, state in self._parts():
            part = [gradients[slot] for slot in slots]
            if all(gradient is None for gradient in part):
                exchanged.append(())
                continue
            found, sent = step.exchange(part, state, moment, self._sampled)
            exchanged.append(sent)
            flags.append(found)
        # The inner optimizer gets the gradients of the others as they are.
        summed = {*self._slots.sparse, *self._slots.dense}
        as_it_is = {
            slot: gradient
            for slot, gradient in enumerate(gradients)
            if gradient is not None and slot not in summed
        }
        return flags, (as_it_is, *exchanged)

    def aggregate(
        self,
        exchanged: tuple[Any, ...],
        has_gradient: Sequence[bool],
        moment: error_feedback_lib.Moment,
    ) -> list[flat_buffer.Gradient]:
        """The second half of a step: the sums over all replicas.

        Args:
            exchanged: From `exchange`.
            has_gradient: For each variable whether there was a gradient.
            moment: As of `exchange`.

        Returns:
            For each variable its gradient or None.
        """
        as_it_is, *of_parts = exchanged
        aggregate = [as_it_is.get(slot) for slot in range(len(has_gradient))]
        for sent, part in zip(of_parts, self._parts(), strict=True):
            slots, step, state = part
            has = tuple(has_gradient[slot] for slot in slots)
            if any(has):
                sums = step.aggregate(sent, state, moment, has)
                for slot, value in zip(slots, sums, strict=True):
                    aggregate[slot] = value if has_gradient[slot] else None
        return aggregate

    def _parts(self) -> tuple[_Part, ...]:
        """The ways to exchange: `(slots, step, state)` of each."""
        local, shared, dense_shared = self.feedback_state.variables()
        sparse_state = round_lib.State(
            local,
            shared,
            self.memory.variables(),
            self.measured.variables(),
        )
        return (
            (
                self._slots.dense,
                self._dense_step,
                round_lib.State(shared=dense_shared),
            ),
            (self._slots.sparse, self.sparse_step, sparse_state),
        )

    def wire_report(self, is_quick: bool = False) -> codecs.WireReport:
        """Returns the bytes that each participant sends, as a `WireReport`."""
        return wire_report.report(
            self._payload_codec_of(self._choices.codec),
            self._sparse_variables,
            self._dense_variables,
            self._participants,
            is_quick,
        )

    def initial_memory(self, density: float) -> tuple[tf.Tensor, ...]:
        """Returns the sparsifier's memory before the first step."""
        if self.kind == "dense":
            return ()
        k = sum(group.k for group in self._groups_at(density))
        return self._choices.sparsifier.initial_memory(
            k, self._buffer.size, self._buffer.dtype
        )

    def layout(self) -> dict[str, Any]:
        """Returns the facts in which a saved state must agree to fit."""
        shapes = [list(variable.shape) for variable in self.variables]
        has_double = any(v.dtype == "float64" for v in self.variables)
        return {
            "variables": _names_of(self.variables),
            saved_state.DENSE_VARIABLES: _names_of(self._dense_variables),
            "shapes": shapes,
            "dtype": "float64" if has_double else "float32",
            "scope": self._choices.scope,
        }

    def check_memory(self, memory: Sequence[np.ndarray]) -> None:
        """Raises unless the sparsifier can go on with a saved memory."""
        if self.kind == "dense":
            return
        sparsifier = self._choices.sparsifier
        if not sparsifier.is_valid_memory(memory, self._buffer.size):
            raise ValueError(
                f"The saved memory of `{type(sparsifier).__name__}` must be of "
                f"a gradient of {self._buffer.size} entries. "
                f"Received: {list(memory)}"
            )

    def kept_sums(self) -> list[tf.Variable]:
        """This replica's variables in which gradients add up."""
        return [
            variable
            for variable, dtype in zip(
                tf.nest.flatten(self.feedback_state.variables()),
                tf.nest.flatten(self.feedback_state.dtypes),
                strict=True,
            )
            if dtype.is_floating
        ]

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns for each local participant the numbers of its last step."""
        return [
            telemetry.by_name(
                arrays,
                self._buffer.sizes,
                self._order,
                self._choices.sparsifier,
            )
            if arrays
            else {}
            for arrays in self.measured.local_arrays()
        ]

    def sparse_paths(self) -> list[str]:
        """Returns the paths of the sparse variables, in their order."""
        in_order = [self._sparse_variables[i] for i in self._order]
        return [str(getattr(v, "path", v.name)) for v in in_order]

    def residual_errors(self) -> list[list[np.ndarray]]:
        """Returns for each local participant its error, an array a variable."""
        rule = self._choices.error_feedback
        place = rule.residual_place
        if place is None:
            raise ValueError(
                "`error_feedback` must keep a residual error to read it. "
                f"Received: error_feedback={rule!r}"
            )
        if not self._sparse_variables:
            return [[] for _ in self.feedback_state.local_arrays()]
        residuals = [
            self._buffer.split(arrays[place])
            for arrays in self.feedback_state.local_arrays()
        ]
        return [[parts[i].numpy() for i in self._order] for parts in residuals]

    @property
    def _order(self) -> list[int]:
        """The places of the sparse variables, in the order of all variables."""
        slots = self._slots.sparse
        return sorted(range(len(slots)), key=slots.__getitem__)

    def _initial_measured(self) -> tuple[tf.Tensor, ...]:
        if not self._choices.telemetry or not self._sparse_variables:
            return ()
        return telemetry.initial(
            self._buffer.sizes,
            self._choices.sparsifier,
            has_ages=self._choices.telemetry == "ages",
        )

    def _initial_feedback(self) -> tuple[tuple[tf.Tensor, ...], ...]:
        """`(local, shared, shared of the variables exchanged densely)`."""
        local: tuple[tf.Tensor, ...] = ()
        shared: tuple[tf.Tensor, ...] = ()
        dense_shared: tuple[tf.Tensor, ...] = ()
        if self.kind != "dense":
            args = self._buffer.size, self._buffer.dtype
            local = self._choices.error_feedback.initial_local(*args)
            shared = self._choices.error_feedback.initial_shared(*args)
        if self._dense_variables:
            buffer = flat_buffer.FlatBuffer.for_variables(self._dense_variables)
            dense_shared = self._dense_rule.initial_shared(
                buffer.size, buffer.dtype
            )
        return local, shared, dense_shared

    def _groups_at(self, density: float) -> tuple[selection.Group, ...]:
        def num_selected(density: float, size: int) -> int:
            at_density = dataclasses.replace(
                self._choices.sparsifier, density=density
            )
            return at_density.num_selected(size)

        num_default = self._slots.num_default
        groups = self._buffer.first(num_default).groups(
            self._choices.scope, functools.partial(num_selected, density)
        )
        own = zip(
            self._buffer.sizes[num_default:],
            self._slots.own_densities,
            strict=True,
        )
        return (
            *groups,
            *(selection.Group(size, num_selected(d, size)) for size, d in own),
        )

    def _payload_codec_of(
        self, codec: codecs.Codec
    ) -> codecs.PayloadCodec | codecs.ScatteredCodec | None:
        """The payload codec of a `Codec`; None if nothing is selected."""
        k = sum(group.k for group in self._groups_at(self.density))
        if not k:
            return None
        size, dtype = self._buffer.size, self._buffer.dtype
        topology, n = self._participants.topology, self._participants.count
        if n > 1 and isinstance(topology, reduce_scatter.ReduceScatter):
            return codecs.ScatteredCodec.of(
                codec,
                ownership.Ownership(size, n),
                k,
                topology.capacity,
                topology.keep,
                dtype,
            )
        return codec.payload(k, size, dtype)


def _names_of(variables: Sequence[keras.Variable]) -> list[str]:
    """The names of variables in a layout."""
    return saved_state.canonical_names(
        [getattr(v, "path", v.name) for v in variables]
    )


def _rule_when_dense(
    error_feedback: error_feedback_lib.ErrorFeedback,
) -> error_feedback_lib.ErrorFeedback:
    """The rule of the variables exchanged densely."""
    try:
        return error_feedback.when_dense()
    except ValueError:  # It does not say: they are just summed.
        return error_feedback_lib.NoFeedback()


def _all_dense(variables: Sequence[keras.Variable]) -> variable_rules.Slots:
    """The slots of an exchange by which no variable is sent sparsely."""
    return variable_rules.Slots(
        (),
        (),
        tuple(
            slot
            for slot, variable in enumerate(variables)
            if variable_rules.can_be_summed(variable)
        ),
    )
