"""A step in which replicas exchange k entries each."""

import tensorflow as tf

from tf_regtopk import aggregation
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import exchange
from tf_regtopk import finiteness
from tf_regtopk import selection
from tf_regtopk import validation
from tf_regtopk import verdict
from tf_regtopk import words


class SparseStep:
    """Accumulate -> score -> select -> exchange -> sum -> clear the error.

    For one k: another density is another `SparseStep`. It keeps nothing between
    steps; who does gives it the variables of this replica.

    Args:
        buffer: `FlatBuffer` of the variables.
        groups: Tuple of `selection.Group`.
        sparsifier: `Sparsifier`.
        error_feedback: `ErrorFeedback`.
        payload_codec: `PayloadCodec` for the k of all groups.
        participants: `exchange.Participants`.
        state_dtypes: `(local, shared, memory)`, tuples of dtypes: those of the
            state, whose variables hold words.
    """

    def __init__(
        self,
        buffer,
        groups,
        sparsifier,
        error_feedback,
        payload_codec,
        participants,
        state_dtypes,
    ):
        self._buffer = buffer
        self._groups = groups
        self._sparsifier = sparsifier
        self._error_feedback = error_feedback
        self._payload_codec = payload_codec
        self._participants = participants
        self._state_dtypes = state_dtypes

    def exchange(self, gradients, feedback, memory, learning_rate, number):
        """Select -> exchange: the first half of a step; nothing is kept yet.

        Args:
            gradients: List of this replica's gradients, None where there is
                none.
            feedback: `(local, shared)`, the variables of the rule of error
                feedback.
            memory: The variables of the sparsifier.
            learning_rate: Scalar float tensor.
            number: Scalar integer tensor, the number of steps taken before.

        Returns:
            `(flags, exchanged)`: `verdict.Flags`, and for `aggregate` a
            structure of tensors.
        """
        gradients = self._participants.sum_within(
            self._buffer.densify(gradients)
        )
        local, shared = feedback
        payload, num_used, *rest = self.select_entries(
            self._buffer.vectors(gradients),
            tuple(gradient is not None for gradient in gradients),
            _read(local),
            _read(shared),
            _read(memory),
            learning_rate,
            (number, self._participants.number),
        )
        payloads = self._participants.all_gather(payload, num_used)
        *entries, flags = self.decode(payloads, number)
        return flags, (*entries, *rest)

    def aggregate(
        self, exchanged, feedback, memory, learning_rate, number, has_gradient
    ):
        """Sum -> remember -> clear the error: the second half of a step.

        Args:
            exchanged: From `exchange`.
            feedback: As of `exchange`, and so the next three.
            memory: See above.
            learning_rate: See above.
            number: See above.
            has_gradient: For each variable whether there was a gradient.

        Returns:
            One gradient for each variable.
        """
        *entries, accumulated = exchanged
        local, shared = feedback
        for i, value in accumulated.items():
            local[i].assign(value)
        total = self.add_entries(
            *entries,
            local,
            shared,
            memory,
            learning_rate,
            number,
            has_gradient,
        )
        return self._buffer.split(total)

    @tf.function(jit_compile=True, autograph=False)
    def select_entries(
        self,
        vectors,
        has_gradient,
        local,
        shared,
        memory,
        learning_rate,
        stream,
    ):
        """Accumulate -> score -> select -> encode, on one replica."""
        step, _ = stream
        local, shared, memory = self._release(local, shared, memory)
        g = tf.concat(vectors, axis=0)
        a, accumulated = self._error_feedback.accumulate(
            local, shared, g, self._step_of(learning_rate, step)
        )
        # Where there is no gradient nothing is sent.
        a = self._buffer.clear_missing(a, has_gradient)
        scores = self._sparsifier.score(a, memory, step)
        validation.check_scores(scores, a)
        indices = selection.select_largest(scores, self._groups, step)
        a = self._sparsifier.restore(a, scores, memory, indices)
        values = selection.take(a, indices)
        payload, sent = self._payload_codec.encode(indices, values, stream)
        magnitude = finiteness.largest_magnitude(
            values if self._sparsifier.selects_non_finite else a, sent
        )
        num_used = self._num_used(payload)
        payload = exchange.add_header(magnitude, step, payload)
        if self._error_feedback.keeps_a:
            accumulated = (a, *accumulated[1:])
        accumulated = self._buffer.keep_missing_state(
            local, accumulated, has_gradient
        )
        accumulated = {
            i: words.hold(value)
            for i, value in enumerate(accumulated)
            if value is not None
        }
        return (
            words.hold(payload),
            num_used,
            words.hold(indices),
            sent,
            accumulated,
        )

    @tf.function(jit_compile=True, autograph=False)
    def decode(self, payloads, number):
        """The entries of all replicas, on each replica, and `Flags`."""
        magnitudes, steps, payloads = exchange.split_header(
            words.release(payloads, tf.int32), self._buffer.dtype
        )
        indices, values, is_valid = self._payload_codec.decode(payloads)
        if values.shape[1] == self._buffer.size:
            # Nobody reads them, and they take as much memory as the values.
            indices = indices[:, :0]
        flags = verdict.Flags(
            are_finite=tf.stack(
                [
                    finiteness.are_finite([values]),
                    finiteness.is_sum_finite(magnitudes),
                ]
            ),
            are_of_this_step=tf.equal(steps, tf.cast(number, tf.int32)),
            are_valid=is_valid,
        )
        return words.hold(indices), values, flags

    @tf.function(jit_compile=True, autograph=False)
    def add_entries(
        self,
        all_indices,
        values,
        indices,
        sent,
        local,
        shared,
        memory,
        learning_rate,
        number,
        has_gradient,
    ):
        """Sum -> remember what became of this replica's entries."""
        step = self._step_of(learning_rate, number)
        all_indices, indices = (
            words.release(held, tf.int32) for held in (all_indices, indices)
        )
        total = self._buffer.clear_missing(
            aggregation.sum_entries(all_indices, values, self._buffer.size),
            has_gradient,
        )
        # What a codec made of the zeros of a missing gradient was not applied.
        applied = tf.where(
            self._buffer.is_missing(indices, has_gradient),
            tf.zeros_like(sent),
            sent,
        )
        _assign(
            memory,
            self._sparsifier.remember(
                indices, applied, selection.take(total, indices)
            ),
        )
        _, old, _ = self._release((), _read(shared), ())
        aggregate, new = self._error_feedback.aggregate(old, total, step)
        _assign(shared, self._buffer.keep_missing_state(old, new, has_gradient))
        # Last, and in place, because only now nothing else needs a.
        old, _, _ = self._release(_read(local), (), ())
        new = self._error_feedback.update(old, indices, sent, step)
        _assign(local, self._buffer.keep_missing_state(old, new, has_gradient))
        return aggregate

    def _num_used(self, payload):
        """How many words of a payload with a header are sent; None for all."""
        if not self._payload_codec.is_variable:
            return None
        header = exchange.header_words(self._buffer.dtype)
        return header + self._payload_codec.num_used(payload)

    def _release(self, *state):
        """What the variables of `(local, shared, memory)` hold."""
        return tuple(
            tuple(map(words.release, held, dtypes))
            for held, dtypes in zip(state, self._state_dtypes, strict=True)
        )

    def _step_of(self, learning_rate, number):
        return error_feedback_lib.Step(
            self._participants.count,
            self._payload_codec.indices.k / self._buffer.size,
            learning_rate,
            number,
        )


def _read(variables):
    return tf.nest.map_structure(lambda v: v.read_value(), variables)


def _assign(variables, values):
    """Assigns those of the values that are not None."""
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            variable.assign(words.hold(value))
