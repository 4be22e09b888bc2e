"""A step in which replicas exchange whole gradients."""

import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import exchange
from tf_regtopk import finiteness
from tf_regtopk import verdict


class PlainStep:
    """Sums whole gradients, and nothing else."""

    def exchange(self, gradients, feedback, memory, learning_rate, number):
        """As `SparseStep.exchange`."""
        del feedback, memory, learning_rate, number
        totals = exchange.all_reduce_sum(
            [gradient for gradient in gradients if gradient is not None]
        )
        return _flags_of(totals), tuple(totals)

    def aggregate(
        self, exchanged, feedback, memory, learning_rate, number, has_gradient
    ):
        """As `SparseStep.aggregate`."""
        del feedback, memory, learning_rate, number
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
    """

    def __init__(self, buffer, error_feedback):
        self._buffer = buffer
        self._error_feedback = error_feedback

    def exchange(self, gradients, feedback, memory, learning_rate, number):
        """As `SparseStep.exchange`."""
        del memory
        _, shared = feedback
        gradients = self._buffer.densify(gradients)
        a = self._accumulate(
            self._buffer.vectors(gradients),
            tuple(gradient is not None for gradient in gradients),
            [variable.read_value() for variable in shared],
            learning_rate,
            number,
        )
        totals = exchange.all_reduce_sum([a])
        return _flags_of(totals), tuple(totals)

    def aggregate(
        self, exchanged, feedback, memory, learning_rate, number, has_gradient
    ):
        """As `SparseStep.aggregate`."""
        del memory
        _, shared = feedback
        total = self._apply(
            *exchanged,
            shared,
            learning_rate,
            number,
            has_gradient,
        )
        return self._buffer.split(total)

    @tf.function(jit_compile=True, autograph=False)
    def _accumulate(self, vectors, has_gradient, shared, learning_rate, number):
        g = tf.concat(vectors, axis=0)
        a, _ = self._error_feedback.accumulate(
            (), shared, g, self._step_of(learning_rate, number)
        )
        return self._buffer.clear_missing(a, has_gradient)

    @tf.function(jit_compile=True, autograph=False)
    def _apply(self, total, shared, learning_rate, number, has_gradient):
        old = [variable.read_value() for variable in shared]
        aggregate, new = self._error_feedback.aggregate(
            old, total, self._step_of(learning_rate, number)
        )
        new = self._buffer.keep_missing_state(old, new, has_gradient)
        for variable, value in zip(shared, new, strict=True):
            variable.assign(value)
        return aggregate

    def _step_of(self, learning_rate, number):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return error_feedback_lib.Step(replicas, 1.0, learning_rate, number)


def _flags_of(totals):
    return verdict.Flags(are_finite=finiteness.are_finite(totals))
