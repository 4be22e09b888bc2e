"""From the gradients of this replica to the sum that all replicas apply."""

import dataclasses
import math

from tf_regtopk import dense_step
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import exchange
from tf_regtopk import finiteness
from tf_regtopk import flat_buffer
from tf_regtopk import replica_state
from tf_regtopk import sparse_step
from tf_regtopk import wire

EXCHANGES = ("sparse", "dense")


class GradientExchange:
    """Which variables are exchanged in which way, and what is kept for it.

    To be created in the scope of the strategy.

    Args:
        kind: `"sparse"` or `"dense"`.
        variables: List of the trainable variables.
        participants: `exchange.Participants`.
        density: Float, the share of the entries to send.
        sparsifier: `Sparsifier`, and so on as of `SparsifiedOptimizer`:
        codec: `Codec`.
        error_feedback: `ErrorFeedback`.
        scope: `"global"` or `"per_variable"`.
        dense_below: Integer.
    """

    def __init__(
        self,
        kind,
        variables,
        participants,
        density,
        *,
        sparsifier,
        codec,
        error_feedback,
        scope,
        dense_below,
    ):
        self.kind = kind
        self._participants = participants
        self._sparsifier = sparsifier
        self._codec = codec
        self._scope = scope
        self._rule = error_feedback
        if kind == "dense":
            self._rule = error_feedback.when_dense()
            is_plain = self._rule == error_feedback_lib.NoFeedback()
            dense_below = math.inf if is_plain else 0
        sparse, dense = _partition(variables, dense_below)
        self._sparse_slots, self._dense_slots = sparse, dense
        self.sparse_variables = [variables[slot] for slot in sparse]
        self._dense_variables = [variables[slot] for slot in dense]
        self.buffer = flat_buffer.FlatBuffer.for_variables(
            self.sparse_variables
        )
        self.feedback_state = replica_state.ReplicaState(
            self._initial_feedback, participants
        )
        self.start_with(density)

    def start_with(self, density):
        """Sends this share of the entries; what was remembered is dropped."""
        self.density = density
        self.memory = replica_state.ReplicaState(
            lambda: self.initial_memory(density), self._participants
        )
        if self.kind == "dense":
            self.step = dense_step.DenseStep(self.buffer, self._rule)
            return
        # Of a single participant nothing is sent, and nothing has to be short.
        codec = self._codec
        if self._participants.count == 1:
            codec = dataclasses.replace(codec, indices="int32")
        self.step = sparse_step.SparseStep(
            self.buffer,
            self._groups_at(density),
            self._sparsifier,
            self._rule,
            self._payload_codec_of(codec),
            self._participants,
        )

    def exchange(self, gradients, learning_rate, number):
        """The first half of a step; nothing is kept yet.

        Args:
            gradients: For each variable this replica's gradient or None.
            learning_rate: Scalar float tensor, the inner optimizer's.
            number: Scalar integer tensor, the number of steps taken before.

        Returns:
            `(is_finite, exchanged)`, as of `OptimizerWrapper._exchange`.
        """
        dense = {
            slot: gradients[slot]
            for slot in self._dense_slots
            if gradients[slot] is not None
        }
        totals = exchange.all_reduce_sum(list(dense.values()))
        is_finite = finiteness.are_finite(totals)
        # What the inner optimizer is to see as it is.
        as_it_is = {
            slot: gradient
            for slot, gradient in enumerate(gradients)
            if gradient is not None and slot not in self._sparse_slots
        } | dict(zip(dense, totals, strict=True))

        sparse = [gradients[slot] for slot in self._sparse_slots]
        if all(gradient is None for gradient in sparse):
            return is_finite, (as_it_is, ())
        are_finite, exchanged = self.step.exchange(
            sparse,
            self.feedback_state.variables(),
            self.memory.variables(),
            learning_rate,
            number,
        )
        return is_finite & are_finite, (as_it_is, exchanged)

    def aggregate(self, exchanged, has_gradient, learning_rate, number):
        """The second half of a step: the sums over all replicas.

        Args:
            exchanged: From `exchange`.
            has_gradient: For each variable whether there was a gradient.
            learning_rate: As of `exchange`.
            number: As of `exchange`.

        Returns:
            For each variable its gradient or None.
        """
        as_it_is, exchanged = exchanged
        aggregate = [as_it_is.get(slot) for slot in range(len(has_gradient))]
        if exchanged:
            parts = self.step.aggregate(
                exchanged,
                self.feedback_state.variables(),
                self.memory.variables(),
                learning_rate,
                number,
                tuple(has_gradient[slot] for slot in self._sparse_slots),
            )
            for slot, part in zip(self._sparse_slots, parts, strict=True):
                aggregate[slot] = part if has_gradient[slot] else None
        return aggregate

    def wire_report(self):
        """What each participant sends a step, as a `WireReport`."""
        sparse, dense = self.sparse_variables, self._dense_variables
        payload_codec = None
        if self.kind == "sparse":
            payload_codec = self._payload_codec_of(self._codec)
        else:
            sparse, dense = [], [*sparse, *dense]
        return wire.report(
            payload_codec, sparse, dense, self._participants.count
        )

    def initial_memory(self, density):
        """What the sparsifier remembers before the first step."""
        if self.kind == "dense":
            return ()
        k = sum(group.k for group in self._groups_at(density))
        return self._sparsifier.initial_memory(k, self.buffer.dtype)

    def _initial_feedback(self):
        size, dtype = self.buffer.size, self.buffer.dtype
        return (
            self._rule.initial_local(size, dtype),
            self._rule.initial_shared(size, dtype),
        )

    def _groups_at(self, density):
        sparsifier = dataclasses.replace(self._sparsifier, density=density)
        return self.buffer.groups(self._scope, sparsifier.num_selected)

    def _payload_codec_of(self, codec):
        """The `PayloadCodec` of a `Codec`; None if nothing is selected."""
        k = sum(group.k for group in self._groups_at(self.density))
        if not k:
            return None
        return codec.payload(k, self.buffer.size, self.buffer.dtype)


def _partition(variables, dense_below):
    """The slots of variables exchanged sparsely, and of those densely."""
    sparse, dense = [], []
    for slot, variable in enumerate(variables):
        size = math.prod(variable.shape)
        # Of an empty variable there is nothing to exchange.  A "gradient"
        # to overwrite with (float8 scales) is no summand but the next value,
        # and the inner optimizer assigns it.
        if size and not getattr(variable, "overwrite_with_gradient", False):
            (sparse if size >= dense_below else dense).append(slot)
    return tuple(sparse), tuple(dense)
