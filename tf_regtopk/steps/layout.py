"""The way in which each variable is exchanged, and the sizes that follow."""

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
from tf_regtopk.codecs import scattered
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.saving import layouts
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import telemetry
from tf_regtopk.steps import variable_rules

# "all_gather" sends the entries to all where the topology sends them to owners.
Exchange: TypeAlias = Literal["sparse", "all_gather", "dense"]
# Those that users can ask for.
EXCHANGES: tuple[Exchange, ...] = ("sparse", "dense")


def candidates(topology: topology_lib.Topology) -> tuple[Exchange, ...]:
    """The exchanges of which `exchange="auto"` chooses one.

    Args:
        topology: `Topology` of the optimizer.

    Example:

    >>> candidates(topology_lib.AllGather())
    ('sparse', 'dense')
    >>> candidates(reduce_scatter.ReduceScatter())
    ('sparse', 'all_gather', 'dense')
    """
    if isinstance(topology, reduce_scatter.ReduceScatter):
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


class Layout:
    """The variables that are exchanged in each way, in their order.

    Holds no state of a training.

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
        participants: topology_lib.Participants,
        choices: Choices,
    ) -> None:
        self.kind = kind
        self.choices = choices
        if kind == "all_gather":
            assert isinstance(
                participants.topology, reduce_scatter.ReduceScatter
            )
            participants = topology_lib.Participants(
                participants.topology.gathering
            )
        self.participants = participants
        self.dense_rule = _rule_when_dense(choices.error_feedback)
        self.slots = (
            choices.rules.slots(variables)
            if kind != "dense"
            else _all_dense(variables)
        )
        sparse, _, dense = self.slots
        self.sparse_variables = [variables[slot] for slot in sparse]
        self.dense_variables = [variables[slot] for slot in dense]
        self.buffer = flat_buffer.FlatBuffer.for_variables(
            self.sparse_variables
        )

    @property
    def has_dense_state(self) -> bool:
        """True if the variables exchanged densely have a state as well."""
        return self.dense_rule != error_feedback_lib.NoFeedback()

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that have a state of error feedback."""
        dense = self.dense_variables if self.has_dense_state else []
        return [*self.sparse_variables, *dense]

    @property
    def default_density(self) -> float:
        """The density of the sparsifier."""
        return self.choices.sparsifier.density_of(
            self.buffer.first(self.slots.num_default).size
        )

    @property
    def order(self) -> list[int]:
        """The places of the sparse variables, in the order of all variables."""
        slots = self.slots.sparse
        return sorted(range(len(slots)), key=slots.__getitem__)

    def groups_at(self, density: float) -> tuple[selection.Group, ...]:
        """The groups of variables of which entries are selected together.

        Args:
            density: The share of the entries to send.
        """

        def num_selected(density: float, size: int) -> int:
            at_density = dataclasses.replace(
                self.choices.sparsifier, density=density
            )
            return at_density.num_selected(size)

        num_default = self.slots.num_default
        groups = self.buffer.first(num_default).groups(
            self.choices.scope, functools.partial(num_selected, density)
        )
        own = zip(
            self.buffer.sizes[num_default:],
            self.slots.own_densities,
            strict=True,
        )
        return (
            *groups,
            *(selection.Group(size, num_selected(d, size)) for size, d in own),
        )

    def payload_codec_at(
        self, density: float, codec: codecs.Codec
    ) -> codecs.PayloadCodec | codecs.ScatteredCodec | None:
        """The payload codec of a `Codec`; None if nothing is selected.

        Args:
            density: The share of the entries to send.
            codec: `Codec`.
        """
        k = sum(group.k for group in self.groups_at(density))
        if not k:
            return None
        return scattered.payload_codec(
            codec,
            k,
            self.buffer.size,
            self.buffer.dtype,
            self.participants.topology,
            self.participants.count,
        )

    def wire_report(
        self, density: float, is_quick: bool = False
    ) -> codecs.WireReport:
        """Returns the bytes that each participant sends, as a `WireReport`.

        Args:
            density: The share of the entries to send.
            is_quick: As of `wire_report.report`.
        """
        return wire_report.report(
            self.payload_codec_at(density, self.choices.codec),
            self.sparse_variables,
            self.dense_variables,
            self.participants,
            is_quick,
        )

    def initial_feedback(self) -> tuple[tuple[tf.Tensor, ...], ...]:
        """`(local, shared, shared of the variables exchanged densely)`."""
        local: tuple[tf.Tensor, ...] = ()
        shared: tuple[tf.Tensor, ...] = ()
        dense_shared: tuple[tf.Tensor, ...] = ()
        if self.kind != "dense":
            args = self.buffer.size, self.buffer.dtype
            local = self.choices.error_feedback.initial_local(*args)
            shared = self.choices.error_feedback.initial_shared(*args)
        if self.dense_variables:
            buffer = flat_buffer.FlatBuffer.for_variables(self.dense_variables)
            dense_shared = self.dense_rule.initial_shared(
                buffer.size, buffer.dtype
            )
        return local, shared, dense_shared

    def initial_memory(self, density: float) -> tuple[tf.Tensor, ...]:
        """Returns the sparsifier's memory before the first step."""
        if self.kind == "dense":
            return ()
        k = sum(group.k for group in self.groups_at(density))
        return self.choices.sparsifier.initial_memory(
            k, self.buffer.size, self.buffer.dtype
        )

    def initial_measured(self) -> tuple[tf.Tensor, ...]:
        """The numbers of `telemetry` before the first step."""
        if not self.choices.telemetry or not self.sparse_variables:
            return ()
        return telemetry.initial(
            self.buffer.sizes,
            self.choices.sparsifier,
            has_ages=self.choices.telemetry == "ages",
        )

    def check_memory(self, memory: Sequence[np.ndarray]) -> None:
        """Raises unless the sparsifier can go on with a saved memory."""
        if self.kind == "dense":
            return
        sparsifier = self.choices.sparsifier
        if not sparsifier.is_valid_memory(memory, self.buffer.size):
            raise ValueError(
                f"The saved memory of `{type(sparsifier).__name__}` must be of "
                f"a gradient of {self.buffer.size} entries. "
                f"Received: {list(memory)}"
            )

    def facts(self) -> dict[str, Any]:
        """Returns the facts in which a saved state must agree to fit."""
        shapes = [list(variable.shape) for variable in self.variables]
        has_double = any(v.dtype == "float64" for v in self.variables)
        return {
            "variables": _names_of(self.variables),
            layouts.DENSE_VARIABLES: _names_of(self.dense_variables),
            layouts.DENSITIES: list(self.slots.own_densities),
            "shapes": shapes,
            "dtype": "float64" if has_double else "float32",
            "scope": self.choices.scope,
        }

    def sparse_paths(self) -> list[str]:
        """Returns the paths of the sparse variables, in their order."""
        in_order = [self.sparse_variables[i] for i in self.order]
        return [variable_rules.path_of(v) for v in in_order]


def _names_of(variables: Sequence[keras.Variable]) -> list[str]:
    """The names of variables in a layout."""
    return layouts.canonical_names(
        [variable_rules.path_of(v) for v in variables]
    )


def _rule_when_dense(
    error_feedback: error_feedback_lib.ErrorFeedback,
) -> error_feedback_lib.ErrorFeedback:
    """The rule of the variables exchanged densely, which may just be summed."""
    try:
        return error_feedback.when_dense()
    except ValueError:  # It does not say: they are just summed.
        return error_feedback_lib.NoFeedback()


def _all_dense(variables: Sequence[keras.Variable]) -> variable_rules.Slots:
    """The slots of an exchange by which no variable is sent sparsely."""
    return variable_rules.Slots(
        (), (), tuple(variable_rules.summed_slots(variables))
    )
