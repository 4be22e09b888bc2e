"""A step in which replicas exchange k entries each: `round` with variables."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk.codecs import header as header_lib
from tf_regtopk.distribute import topology
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.kernels import tracing
from tf_regtopk.kernels import words
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import telemetry
from tf_regtopk.steps import verdict
from tf_regtopk.steps import weight_mark

# The `(indices, values)` of some entries; the indices are held.
_Entries: TypeAlias = tuple[tf.Tensor, tf.Tensor]
# A `round.Sent` with only the local tensors that change, by their places.
_Sent: TypeAlias = tuple[tf.Tensor, tf.Tensor, dict[int, tf.Tensor]]
# Tensors about entries that were summed on the way; empty where none were.
Reduced: TypeAlias = tuple[tf.Tensor, ...]
# The entries of all, what this replica has sent, telemetry, and `Reduced`.
_Exchanged: TypeAlias = tuple[_Entries, _Sent, tuple[tf.Tensor, ...], Reduced]


class SparseStep:
    """Send -> exchange -> sum -> settle.

    A `SparseStep` has one k, and another density is another `SparseStep`. It
    keeps no state: the caller passes the variables of this replica.

    Args:
        buffer: `FlatBuffer` of the variables.
        method: `round.Method` for its size.
        participants: `topology.Participants`.
        state_dtypes: `round.State` of dtypes: those of the state, whose
            variables hold words.
    """

    def __init__(
        self,
        buffer: flat_buffer.FlatBuffer,
        method: round_lib.Method,
        participants: topology.Participants,
        state_dtypes: round_lib.State,
    ) -> None:
        self._buffer = buffer
        self._method = method
        self._participants = participants
        self._state_dtypes = state_dtypes

    def exchange(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        state: round_lib.State,
        progress: error_feedback.Progress,
        sampled: Sequence[keras.Variable] = (),
    ) -> tuple[verdict.Flags, _Exchanged]:
        """Send -> exchange: the first half of a step; nothing is kept yet.

        Args:
            gradients: List of this replica's gradients, None where there is
                none.
            state: `round.State` of this replica's variables.
            progress: `error_feedback.Progress`.
            sampled: List of variables, of which replicas compare a
                `weight_mark`.

        Returns:
            `(flags, exchanged)`: `verdict.Flags`, and for `aggregate` a
            structure of tensors.
        """
        with tf.name_scope("tf_regtopk/join"):
            gradients = self._participants.sum_within(
                self._buffer.densify(gradients)
            )
            vectors = self._buffer.vectors(gradients)
        with tf.name_scope("tf_regtopk/send"):
            payload, num_used, sent, measured, mark = self.send(
                vectors,
                state.read(),
                progress,
                self._participants.rank,
                tuple(gradient is not None for gradient in gradients),
                tuple(tf.convert_to_tensor(v) for v in sampled),
            )
        # A single participant is not timed, because it waits for nobody (and
        # its program may be compiled by XLA as a whole, which knows no time).
        is_timed = self._participants.count > 1 and measured
        start = _time_after(payload) if is_timed else None
        payloads, reduced = self._meet(payload, num_used, progress)
        if is_timed:
            seconds = _time_after(payloads) - start
            measured = telemetry.of_exchange(measured, seconds)
        with tf.name_scope("tf_regtopk/decode"):
            entries, flags = self.decode(payloads, mark)
        return flags, (entries, sent, measured, reduced)

    def _meet(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        progress: error_feedback.Progress,
    ) -> tuple[tf.Tensor, Reduced]:
        """The payloads of all participants, and what was found on the way."""
        del progress
        with tf.name_scope("tf_regtopk/exchange"):
            return self._participants.exchange(payload, num_used), ()

    def aggregate(
        self,
        exchanged: _Exchanged,
        state: round_lib.State,
        progress: error_feedback.Progress,
        has_gradient: tuple[bool, ...],
    ) -> list[tf.Tensor]:
        """Sums what all have sent, and settles: the second half of a step.

        Args:
            exchanged: From `exchange`.
            state: As of `exchange`.
            progress: As of `exchange`.
            has_gradient: For each variable whether there was a gradient.

        Returns:
            One gradient for each variable.
        """
        entries, sent, measured, reduced = exchanged
        indices, values, changed = sent
        for i, value in changed.items():
            state.local[i].assign(value)
        with tf.name_scope("tf_regtopk/settle"):
            aggregate = self.settle(
                entries,
                (indices, values),
                state,
                progress,
                has_gradient,
                measured,
                reduced,
            )
        with tf.name_scope("tf_regtopk/split"):
            return self._buffer.split(aggregate)

    @tracing.compiled
    def send(
        self,
        vectors: Sequence[tf.Tensor],
        state: round_lib.State,
        progress: error_feedback.Progress,
        rank: tf.Tensor,
        has_gradient: tuple[bool, ...],
        weights: tuple[tf.Tensor, ...] = (),
    ) -> tuple[
        tf.Tensor, tf.Tensor | None, _Sent, tuple[tf.Tensor, ...], tf.Tensor
    ]:
        """The payload of this replica, and what it holds until `settle`.

        Returns:
            `(payload, num_used, sent, measured, mark)`: words; how many of them
            are sent, None for all; what `round.Sent` holds, but only those
            local tensors that change, by their places; the numbers of
            `telemetry`, if there are variables for them; and a held
            `weight_mark`.
        """
        state = self._release(state)
        gradient = tf.concat(vectors, axis=0)
        payload, sent, a = round_lib.send(
            self._method,
            gradient,
            state,
            self._context_at(progress),
            rank,
            self._buffer.missing(has_gradient),
        )
        magnitude = finiteness.magnitude_of_sent(
            self._method.sparsifier, a, sent.indices, sent.values
        )
        changed = {
            i: words.hold(new)
            for i, (old, new) in enumerate(
                zip(state.local, sent.local, strict=True)
            )
            if new is not old
        }
        mark = weight_mark.mark(weights, progress.number)
        return (
            words.hold(header_lib.add_header(magnitude, mark, payload)),
            self._num_used(payload),
            (words.hold(sent.indices), sent.values, changed),
            self._measure(gradient, a, state, sent, progress),
            words.hold(mark),
        )

    @tracing.compiled
    def decode(
        self, payloads: tf.Tensor, mark: tf.Tensor
    ) -> tuple[_Entries, verdict.Flags]:
        """The entries `(indices, values)` of all replicas, and `Flags`."""
        magnitudes, marks, payloads = header_lib.split_header(
            words.release(payloads, tf.int32), self._buffer.dtype
        )
        indices, values, is_valid = self._method.payload_codec.decode(payloads)
        if values.shape[1] == self._buffer.size:
            # Indices are dropped, because nobody reads them where all entries
            # are sent, and they take as much memory as the values.
            indices = indices[:, :0]
        flags = verdict.Flags(
            are_finite=tf.stack(
                [
                    finiteness.are_finite([values]),
                    finiteness.is_sum_finite(magnitudes),
                ]
            ),
            are_alike=tf.equal(marks, words.release(mark, tf.int32)),
            are_valid=is_valid,
        )
        return (words.hold(indices), values), flags

    @tracing.compiled
    def settle(
        self,
        entries: _Entries,
        sent: _Entries,
        state: round_lib.State,
        progress: error_feedback.Progress,
        has_gradient: tuple[bool, ...],
        measured: tuple[tf.Tensor, ...],
        reduced: Reduced = (),
    ) -> tf.Tensor:
        """The aggregate; assigns the state after the step.

        Args:
            entries: `(indices, values)` of all replicas, from `decode`,
                `[N, n]` each; no indices where all entries are sent. Indices
                are held words.
            sent: `(indices, values)` of this one, `[k]` each, likewise.
            state: `round.State` of variables, whose local ones are those of
                `round.Sent`.
            progress: `error_feedback.Progress`.
            has_gradient: For each variable whether there was a gradient.
            measured: From `send`.
            reduced: From the exchange.

        Returns:
            Float tensor `[J]`.
        """
        all_indices, all_values = entries
        indices, values = sent
        before = self._release(state.read())
        context = self._context_after(progress, reduced)
        missing = self._buffer.missing(has_gradient)
        total = scatter_sum.sum_entries(
            all_indices, all_values, self._buffer.size
        )
        if missing:
            total = missing.clear(total)
        aggregate, shared = round_lib.aggregate(
            self._method, total, before.shared, context, missing
        )
        local, memory = round_lib.settle(
            self._method,
            round_lib.Sent(
                words.release(indices, tf.int32), values, before.local
            ),
            before.memory,
            total,
            context,
            missing,
            self._taken_over(reduced),
        )
        if measured:
            all_sent = self._all_sent(all_values, reduced)
            measured = telemetry.of_settle(measured, all_sent, total)
            _assign(state.measured, before.measured, measured)
        _assign(state.memory, before.memory, memory)
        _assign(state.shared, before.shared, shared)
        _assign(state.local, before.local, local)
        return aggregate

    def _num_used(self, payload: tf.Tensor) -> tf.Tensor | None:
        """Number of words of a payload with a header to send; None for all."""
        if not self._method.payload_codec.is_variable:
            return None
        header = header_lib.header_words(self._buffer.dtype)
        assert isinstance(self._method.payload_codec, codecs.PayloadCodec)
        return header + self._method.payload_codec.num_used(payload)

    def _measure(
        self,
        gradient: tf.Tensor,
        a: tf.Tensor,
        state: round_lib.State,
        sent: round_lib.Sent,
        progress: error_feedback.Progress,
    ) -> tuple[tf.Tensor, ...]:
        """The numbers of `telemetry`; nothing if the state has no place."""
        if not state.measured:
            return ()
        return telemetry.of_send(
            self._method,
            self._buffer.sizes,
            gradient,
            a,
            state,
            sent,
            progress.number,
        )

    def _release(self, state: round_lib.State) -> round_lib.State:
        """The values that the variables of a state hold."""
        return round_lib.State(
            *(
                tuple(map(words.release, held, dtypes))
                for held, dtypes in zip(state, self._state_dtypes, strict=True)
            )
        )

    def _context_at(
        self, progress: error_feedback.Progress
    ) -> error_feedback.StepContext:
        return error_feedback.StepContext(
            self._participants.count,
            self._method.payload_codec.k / self._buffer.size,
            progress.learning_rate,
            progress.number,
        )

    def _context_after(
        self, progress: error_feedback.Progress, reduced: Reduced
    ) -> error_feedback.StepContext:
        """The context of the second half."""
        del reduced
        return self._context_at(progress)

    def _taken_over(self, reduced: Reduced) -> round_lib.TakenOver | None:
        """The errors of sums that this replica takes over."""
        del reduced
        return None

    def _all_sent(self, all_values: tf.Tensor, reduced: Reduced) -> tf.Tensor:
        """The sum of the magnitudes of all entries in the total."""
        del reduced
        return tf.reduce_sum(tf.abs(all_values))


def _time_after(tensor: tf.Tensor) -> tf.Tensor:
    """Seconds since 1970 when a tensor is there, as the host sees it."""
    with tf.control_dependencies([tensor]), tf.device("CPU:0"):
        return tf.timestamp()


def _assign(
    variables: Sequence[tf.Variable],
    before: Sequence[tf.Tensor],
    after: Sequence[tf.Tensor],
) -> None:
    """Assigns the values that are not those from before."""
    for variable, old, new in zip(variables, before, after, strict=True):
        if new is not old:
            variable.assign(words.hold(new))
