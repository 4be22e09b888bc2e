"""A step in which replicas exchange whole gradients."""

from collections.abc import Iterable
from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.distribute import collectives
from tf_regtopk.kernels import tracing
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import verdict


class PlainStep:
    """Sums whole gradients, and nothing else."""

    def exchange(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        state: round_lib.State,
        progress: error_feedback_lib.Progress,
        sampled: Sequence[keras.Variable] = (),
    ) -> tuple[verdict.Flags, tuple[tf.Tensor | tf.IndexedSlices, ...]]:
        """Sums the gradients; see `SparseStep.exchange`."""
        del state, progress, sampled
        with tf.name_scope("tf_regtopk/all_reduce"):
            totals = collectives.all_reduce_sum(
                [gradient for gradient in gradients if gradient is not None]
            )
        return _flags_of(totals), tuple(totals)

    def aggregate(
        self,
        exchanged: Iterable[tf.Tensor | tf.IndexedSlices],
        state: round_lib.State,
        progress: error_feedback_lib.Progress,
        has_gradient: tuple[bool, ...],
    ) -> list[flat_buffer.Gradient]:
        """Returns the gradients to apply; see `SparseStep.aggregate`."""
        del state, progress
        totals = iter(exchanged)
        return [next(totals) if has else None for has in has_gradient]


class DenseStep:
    """Sums whole gradients, for rules of error feedback that keep momentum.

    What `SparseStep` comes to if every entry is sent as it is, with an
    all-reduce.

    Args:
        buffer: `FlatBuffer` of the variables.
        error_feedback: `ErrorFeedback` without local state, from
            `ErrorFeedback.when_dense`.
        num_replicas: N.
    """

    def __init__(
        self,
        buffer: flat_buffer.FlatBuffer,
        error_feedback: error_feedback_lib.ErrorFeedback,
        num_replicas: int,
    ) -> None:
        self._buffer = buffer
        self._error_feedback = error_feedback
        self._num_replicas = num_replicas

    def exchange(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        state: round_lib.State,
        progress: error_feedback_lib.Progress,
        sampled: Sequence[keras.Variable] = (),
    ) -> tuple[verdict.Flags, tuple[tf.Tensor, ...]]:
        """Sums the gradients; see `SparseStep.exchange`."""
        del sampled
        gradients = self._buffer.densify(gradients)
        a = self._accumulate(
            self._buffer.vectors(gradients),
            tuple(variable.read_value() for variable in state.shared),
            progress,
            tuple(gradient is not None for gradient in gradients),
        )
        with tf.name_scope("tf_regtopk/all_reduce"):
            totals = collectives.all_reduce_sum([a])
        return _flags_of(totals), tuple(totals)

    def aggregate(
        self,
        exchanged: Iterable[tf.Tensor],
        state: round_lib.State,
        progress: error_feedback_lib.Progress,
        has_gradient: tuple[bool, ...],
    ) -> list[tf.Tensor]:
        """Returns the gradients to apply; see `SparseStep.aggregate`."""
        [total] = exchanged
        aggregate = self._apply(total, state.shared, progress, has_gradient)
        return self._buffer.split(aggregate)

    @tracing.compiled
    def _accumulate(
        self,
        vectors: Sequence[tf.Tensor],
        shared: tuple[tf.Tensor, ...],
        progress: error_feedback_lib.Progress,
        has_gradient: tuple[bool, ...],
    ) -> tf.Tensor:
        g = tf.concat(vectors, axis=0)
        a, _ = self._error_feedback.accumulate(
            (), shared, g, self._context_at(progress)
        )
        missing = self._buffer.missing(has_gradient)
        return missing.clear(a) if missing else a

    @tracing.compiled
    def _apply(
        self,
        total: tf.Tensor,
        shared: tuple[tf.Variable, ...],
        progress: error_feedback_lib.Progress,
        has_gradient: tuple[bool, ...],
    ) -> tf.Tensor:
        old = tuple(variable.read_value() for variable in shared)
        aggregate, new = self._error_feedback.aggregate(
            old, total, self._context_at(progress)
        )
        if missing := self._buffer.missing(has_gradient):
            new = missing.keep_state(old, new)
        for variable, value in zip(shared, new, strict=True):
            variable.assign(value)
        return aggregate

    def _context_at(
        self, progress: error_feedback_lib.Progress
    ) -> error_feedback_lib.StepContext:
        return error_feedback_lib.StepContext(
            self._num_replicas, 1.0, *progress
        )


def _flags_of(
    totals: Sequence[tf.Tensor | tf.IndexedSlices],
) -> verdict.Flags:
    return verdict.Flags(are_finite=finiteness.are_finite(totals))
