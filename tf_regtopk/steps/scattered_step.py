"""A step in which entries are summed by their owners."""

import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk.codecs import header as header_lib
from tf_regtopk.codecs import scattered
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.kernels import tracing
from tf_regtopk.kernels import words
from tf_regtopk.sizes import payload as sizes
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import sparse_step


class ScatteredStep(sparse_step.SparseStep):
    """Send -> scatter -> reduce -> exchange -> sum -> settle.

    As a `SparseStep`, whose topology is a `ReduceScatter`, and whose codec is a
    `ScatteredCodec`.
    """

    def _meet(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        progress: error_feedback.Progress,
    ) -> tuple[tf.Tensor, sparse_step.Reduced]:
        del num_used
        num_header = header_lib.header_words(self._buffer.dtype)
        with tf.name_scope("tf_regtopk/scatter"):
            parts = tf.reshape(
                payload[num_header:], [self._participants.count, -1]
            )
            parts = self._topology.scatter(parts, self._participants.cluster)
        with tf.name_scope("tf_regtopk/reduce"):
            kept, *taken_over = self.reduce(
                payload[:num_header], parts, progress.number
            )
        with tf.name_scope("tf_regtopk/exchange"):
            payloads = self._participants.exchange(kept)
        facts = payloads[:, num_header : num_header + sizes.NUM_FACTS]
        return payloads, (*taken_over, facts)

    @tracing.compiled
    def reduce(
        self,
        header: tf.Tensor,
        parts: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Sums the entries of this owner.

        Args:
            header: Held words, the header of this replica.
            parts: Held words `[N, length]`, what all replicas have sent here.
            step: Scalar integer tensor, the number of steps taken before.

        Returns:
            `(payload, indices, error)`: the held words for all, and the
            `round.TakenOver` of this owner, the indices held.
        """
        payload, kept = self._codec.reduce(words.release(parts, tf.int32), step)
        magnitude, mark, _ = header_lib.split_header(
            words.release(header, tf.int32)[tf.newaxis], self._buffer.dtype
        )
        magnitude = finiteness.largest_magnitude(magnitude, kept.sums)
        return (
            words.hold(header_lib.add_header(magnitude, mark[0], payload)),
            words.hold(kept.indices),
            kept.error,
        )

    def _context_after(
        self, progress: error_feedback.Progress, reduced: sparse_step.Reduced
    ) -> error_feedback.StepContext:
        most = self._participants.count * self._buffer.size
        number = self._facts(reduced).num_accepted
        return self._context_at(progress)._replace(
            accepted=tf.cast(number, self._buffer.dtype) / most
        )

    def _taken_over(
        self, reduced: sparse_step.Reduced
    ) -> round_lib.TakenOver | None:
        indices, error = reduced[:2]
        return round_lib.TakenOver(words.release(indices, tf.int32), error)

    def _all_sent(
        self, all_values: tf.Tensor, reduced: sparse_step.Reduced
    ) -> tf.Tensor:
        return tf.cast(self._facts(reduced).magnitudes, all_values.dtype)

    def _facts(self, reduced: sparse_step.Reduced) -> scattered.Facts:
        return self._codec.facts(words.release(reduced[2], tf.int32))

    @property
    def _codec(self) -> codecs.ScatteredCodec:
        assert isinstance(self._method.payload_codec, codecs.ScatteredCodec)
        return self._method.payload_codec

    @property
    def _topology(self) -> reduce_scatter.ReduceScatter:
        assert isinstance(
            self._participants.topology, reduce_scatter.ReduceScatter
        )
        return self._participants.topology
