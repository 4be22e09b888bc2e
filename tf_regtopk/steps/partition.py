"""The parts of a gradient, the step of each, and what the steps keep."""

from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.distribute import replica_state
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import tracing
from tf_regtopk.steps import dense_step
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import layout as layout_lib
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import scattered_step
from tf_regtopk.steps import sparse_step
from tf_regtopk.steps import telemetry
from tf_regtopk.steps import verdict
from tf_regtopk.steps import weight_mark

# The slots of some variables, the step by which they are exchanged, its state.
_Part: TypeAlias = tuple[
    tuple[int, ...],
    dense_step.PlainStep | dense_step.DenseStep | sparse_step.SparseStep,
    round_lib.State,
]


class Partition:
    """The exchange of the parts of a `Layout`, and what the exchange keeps.

    To be created in the scope of the strategy.

    Args:
        layout: `Layout` of the trainable variables.
        variables: List of these.
    """

    def __init__(
        self, layout: layout_lib.Layout, variables: Sequence[keras.Variable]
    ) -> None:
        self.layout = layout
        if layout.kind != "dense":
            device_kind.warn_of_serial_scatters()
        self._sampled = weight_mark.sample(variables)
        self._dense_step: dense_step.PlainStep | dense_step.DenseStep = (
            dense_step.PlainStep()
        )
        participants = layout.participants
        if layout.has_dense_state:
            self._dense_step = tracing.of_equal(
                dense_step.DenseStep,
                flat_buffer.FlatBuffer.for_variables(layout.dense_variables),
                layout.dense_rule,
                participants.cluster.num_replicas,
            )
        self.feedback_state = replica_state.ReplicaState(
            layout.initial_feedback, participants
        )
        self.measured = replica_state.ReplicaState(
            layout.initial_measured, participants
        )
        self._steps: dict[float, sparse_step.SparseStep] = {}
        self.start_with(layout.default_density)

    def start_with(self, density: float) -> None:
        """Sets the share of the entries to send, and forgets the memory."""
        self.density = density
        self.memory = replica_state.ReplicaState(
            lambda: self.layout.initial_memory(density),
            self.layout.participants,
        )
        # Steps are kept, because TensorFlow never frees a compiled program.
        if density not in self._steps:
            self._steps[density] = self._sparse_step_at(density)
        self.sparse_step = self._steps[density]

    def _sparse_step_at(self, density: float) -> sparse_step.SparseStep:
        # Indices are not compressed for a single participant, because nothing
        # is sent.
        codec = self.layout.choices.codec
        if self.layout.participants.count == 1:
            codec = dataclasses.replace(codec, indices="int32")
        local, shared, _ = self.feedback_state.dtypes
        payload_codec = self.layout.payload_codec_at(density, codec)
        step = (
            scattered_step.ScatteredStep
            if isinstance(payload_codec, codecs.ScatteredCodec)
            else sparse_step.SparseStep
        )
        return tracing.of_equal(
            step,
            self.layout.buffer,
            round_lib.Method(
                self.layout.choices.sparsifier,
                self.layout.choices.error_feedback,
                # None, because no step is taken, where nothing is selected.
                payload_codec,  # type: ignore[arg-type]
                self.layout.groups_at(density),
            ),
            self.layout.participants,
            round_lib.State(
                local, shared, self.memory.dtypes, self.measured.dtypes
            ),
        )

    def exchange(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        progress: error_feedback_lib.Progress,
    ) -> tuple[list[verdict.Flags], tuple[Any, ...]]:
        """The first half of a step; nothing is kept yet.

        Args:
            gradients: For each variable this replica's gradient or None.
            progress: `error_feedback.Progress`.

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
            found, sent = step.exchange(part, state, progress, self._sampled)
            exchanged.append(sent)
            flags.append(found)
        # The inner optimizer gets the gradients of the others as they are.
        summed = {*self.layout.slots.sparse, *self.layout.slots.dense}
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
        progress: error_feedback_lib.Progress,
    ) -> list[flat_buffer.Gradient]:
        """The second half of a step: the sums over all replicas.

        Args:
            exchanged: From `exchange`.
            has_gradient: For each variable whether there was a gradient.
            progress: As of `exchange`.

        Returns:
            For each variable its gradient or None.
        """
        as_it_is, *of_parts = exchanged
        aggregate = [as_it_is.get(slot) for slot in range(len(has_gradient))]
        for sent, part in zip(of_parts, self._parts(), strict=True):
            slots, step, state = part
            has = tuple(has_gradient[slot] for slot in slots)
            if any(has):
                sums = step.aggregate(sent, state, progress, has)
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
                self.layout.slots.dense,
                self._dense_step,
                round_lib.State(shared=dense_shared),
            ),
            (self.layout.slots.sparse, self.sparse_step, sparse_state),
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
                self.layout.buffer.sizes,
                self.layout.order,
                self.layout.choices.sparsifier,
            )
            if arrays
            else {}
            for arrays in self.measured.local_arrays()
        ]

    def residual_errors(self) -> list[list[np.ndarray]]:
        """Returns for each local participant its error, an array a variable."""
        rule = self.layout.choices.error_feedback
        place = rule.residual_place
        if place is None:
            raise ValueError(
                "`error_feedback` must keep a residual error to read it. "
                f"Received: error_feedback={rule!r}"
            )
        if not self.layout.sparse_variables:
            return [[] for _ in self.feedback_state.local_arrays()]
        residuals = [
            self.layout.buffer.split(arrays[place])
            for arrays in self.feedback_state.local_arrays()
        ]
        return [
            [parts[i].numpy() for i in self.layout.order] for parts in residuals
        ]
