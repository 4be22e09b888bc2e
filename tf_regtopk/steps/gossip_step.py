"""A step in which replicas average weights: `gossip_round` with variables."""

from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.codecs import header as header_lib
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import neighbours as neighbours_lib
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.kernels import tracing
from tf_regtopk.kernels import words
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import gossip_round
from tf_regtopk.steps import round as round_lib

# The indices and values of what was sent, and the local tensors that change by
# sending, by their places; indices are held.
_Sent: TypeAlias = tuple[tf.Tensor, tf.Tensor, dict[int, tf.Tensor]]


class GossipStep:
    """Send -> exchange with neighbours -> mix.

    No replica hears from all others, so that none can be told to skip a step.

    Args:
        buffer: `FlatBuffer` of the variables.
        method: `round.Method` for its size, with a sparsifier that remembers
            nothing.
        mixing_rule: `MixingRule`.
        consensus_step_size: Float gamma.
        num_replicas: N.
    """

    def __init__(
        self,
        buffer: flat_buffer.FlatBuffer,
        method: round_lib.Method,
        mixing_rule: mixing_rules.MixingRule,
        consensus_step_size: float,
        num_replicas: int,
    ) -> None:
        self._buffer = buffer
        self._method = method
        self._mixing_rule = mixing_rule
        self._consensus_step_size = consensus_step_size
        self._num_replicas = num_replicas

    def moves(
        self,
        weights: Sequence[tf.Tensor],
        state: round_lib.State,
        number: tf.Tensor,
        neighbours: neighbours_lib.Neighbours,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns what is to be added to each variable of this replica.

        To be called in a replica context.

        Args:
            weights: List of this replica's weights.
            state: `round.State` of this replica's variables.
            number: Scalar integer tensor, the number of exchanges before.
            neighbours: `Neighbours`, with the weights W - I.

        Returns:
            `(moves, payloads)`: a list of tensors like the weights, and what
            has arrived, a tensor `[M, length]` of held words.

        Raises:
            tf.errors.InvalidArgumentError: When run, if a neighbour is at
                another step, its weights are not finite, or its payload held
                no k entries.
        """
        rank = strategy_lib.replica_rank()
        with tf.name_scope("tf_regtopk/join"):
            vectors = self._buffer.vectors(weights)
        with tf.name_scope("tf_regtopk/send"):
            payload, sent = self.send(vectors, state.read(), number, rank)
        with tf.name_scope("tf_regtopk/exchange"):
            payloads = neighbours.exchange(payload, number)
        with tf.name_scope("tf_regtopk/decode"):
            senders = neighbours.senders(number)
            with tf.device("CPU:0"):
                expected = words.hold(self._marks(number, senders))
            indices, values, changed = sent
            d, flags = self.decode(
                payloads, neighbours.weights(number), expected, values
            )
        with tf.name_scope("tf_regtopk/check"):
            checks = _checks(flags, senders)
        # Nothing is kept of a step that raises an error.
        with tf.control_dependencies([c for c in checks if c is not None]):
            d, payloads = tf.identity(d), tf.identity(payloads)
        for i, value in changed.items():
            with tf.control_dependencies([d]):
                state.local[i].assign(value)
        with tf.name_scope("tf_regtopk/settle"):
            move = self.settle(d, (indices, values), state, number)
        with tf.name_scope("tf_regtopk/split"):
            return self._buffer.split(move), payloads

    @tracing.compiled
    def send(
        self,
        vectors: Sequence[tf.Tensor],
        state: round_lib.State,
        number: tf.Tensor,
        rank: tf.Tensor,
    ) -> tuple[tf.Tensor, _Sent]:
        """The payload of this replica, held, and what it holds until `settle`.

        Args:
            vectors: List of tensors, of which the concatenation is x.
            state: `round.State` of tensors.
            number: As of `moves`.
            rank: Scalar int32 tensor.
        """
        payload, sent, a = round_lib.send(
            self._method,
            tf.concat(vectors, axis=0),
            state,
            self._context_at(number),
            rank,
        )
        magnitude = finiteness.magnitude_of_sent(
            self._method.sparsifier, a, sent.indices, sent.values
        )
        mark = self._marks(number, rank)
        changed = {
            i: new
            for i, (old, new) in enumerate(
                zip(state.local, sent.local, strict=True)
            )
            if new is not old
        }
        payload = header_lib.add_header(magnitude, mark, payload)
        indices = words.hold(sent.indices)
        return words.hold(payload), (indices, sent.values, changed)

    @tracing.compiled
    def decode(
        self,
        payloads: tf.Tensor,
        weights: tf.Tensor,
        expected: tf.Tensor,
        own: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The disagreement with the neighbours, and findings about these.

        Args:
            payloads: Tensor `[M, length]` of held words.
            weights: float32 tensor `[M]`.
            expected: Tensor `[M]` of held words, the marks of the senders.
            own: Float tensor `[k]`, the values that this replica has sent.

        Returns:
            `(d, flags)`: a float tensor `[J]`, and a bool tensor `[3, M]` that
            says of each sender whether it is at the same step, whether its
            weights are finite, and whether its payload held k entries.
        """
        magnitudes, marks, payloads = header_lib.split_header(
            words.release(payloads, tf.int32), self._buffer.dtype
        )
        indices, values, is_valid = self._method.payload_codec.decode(payloads)
        are_finite = tf.math.is_finite(magnitudes) & tf.reduce_all(
            tf.math.is_finite(values), axis=1
        )
        d = self._mixing_rule.disagreement(
            mixing_rules.Received(indices, values, weights),
            own,
            self._buffer.size,
        )
        are_alike = tf.equal(marks, words.release(expected, tf.int32))
        # One tensor, because the host waits for each copy from a device.
        return d, tf.stack([are_alike, are_finite, is_valid])

    @tracing.compiled
    def values(self, payloads: tf.Tensor) -> tf.Tensor:
        """The values in payloads.

        Args:
            payloads: As of `decode`.

        Returns:
            Float tensor `[M, k]`.
        """
        _, _, payloads = header_lib.split_header(
            words.release(payloads, tf.int32), self._buffer.dtype
        )
        _, values, _ = self._method.payload_codec.decode(payloads)
        return values

    @tracing.compiled
    def settle(
        self,
        d: tf.Tensor,
        sent: tuple[tf.Tensor, tf.Tensor],
        state: round_lib.State,
        number: tf.Tensor,
    ) -> tf.Tensor:
        """Returns the move of x; assigns the state after the step.

        Args:
            d: Float tensor `[J]`.
            sent: `(indices, values)` of this replica, `[k]` each.
            state: `round.State` of variables, whose local ones are those of
                `round.Sent`.
            number: As of `moves`.
        """
        before = state.read()
        indices, values = sent
        move, after = gossip_round.mix(
            self._method,
            self._consensus_step_size,
            d,
            round_lib.Sent(
                words.release(indices, tf.int32), values, before.local
            ),
            before,
            self._context_at(number),
        )
        for variable, old, new in zip(
            *map(tf.nest.flatten, (state, before, after)), strict=True
        ):
            if new is not old:
                variable.assign(new)
        return move

    def _marks(self, number: tf.Tensor, ranks: tf.Tensor) -> tf.Tensor:
        """The words by which a replica knows step and rank of a sender."""
        number = tf.cast(number, tf.int32)
        return number * self._num_replicas + tf.cast(ranks, tf.int32)

    def _context_at(self, number: tf.Tensor) -> error_feedback_lib.StepContext:
        k = self._method.payload_codec.k
        return error_feedback_lib.StepContext(
            self._num_replicas,
            k / self._buffer.size,
            tf.zeros([]),
            number,
        )


def _checks(flags: tf.Tensor, senders: tf.Tensor) -> list[tf.Operation | None]:
    """Assertions that raise when a neighbour has sent something useless."""

    def check(
        flags: tf.Tensor, message: str, unless: tf.Tensor
    ) -> tf.Operation | None:
        return tf.raw_ops.Assert(
            condition=tf.reduce_all(flags) | unless,
            data=[message, senders, flags],
            summarize=1000,
        )

    with tf.device("CPU:0"):
        are_alike, are_finite, are_valid = tf.unstack(tf.identity(flags))
        # The other flags mean nothing if a sender is at another step.
        is_other_step = ~tf.reduce_all(are_alike)
        return [
            check(
                are_alike,
                "Neighbours must be at the same step. Were the workers "
                "restored from different files? Received from the replicas, "
                "and whether they are:",
                tf.constant(False),
            ),
            check(
                are_finite,
                "The weights of all replicas must be finite, because each "
                "passes them on. Go back to weights that were saved, and lower "
                "the learning rate or `consensus_step_size`. Received from the "
                "replicas, and whether they are:",
                is_other_step,
            ),
            check(
                are_valid,
                "Every payload must hold different, rising indices of the "
                "weights. Do all workers run the same model and optimizer? "
                "Received from the replicas, and whether they do:",
                is_other_step | ~tf.reduce_all(are_finite),
            ),
        ]
