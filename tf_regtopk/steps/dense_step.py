"""A step in which replicas exchange whole gradients."""

import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.distribute import topology
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import verdict


class PlainStep:
    """Sums whole gradients, and nothing else."""

    def exchange(self, gradients, state, moment):
        """Sums the gradients; see `SparseStep.exchange`."""
        del state, moment
        totals = topology.AllReduce().sum(
            [gradient for gradient in gradients if gradient is not None]
        )
        return _flags_of(totals), tuple(totals)

    def aggregate(self, exchanged, state, moment, has_gradient):
        """Returns the gradients to apply; see `SparseStep.aggregate`."""
        del state, moment
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

    def exchange(self, gradients, state, moment):
        """Sums the gradients; see `SparseStep.exchange`."""
        gradients = self._buffer.densify(gradients)
        a = self._accumulate(
            self._buffer.vectors(gradients),
            [variable.read_value() for variable in state.shared],
            moment,
            tuple(gradient is not None for gradient in gradients),
        )
        totals = topology.AllReduce().sum([a])
        return _flags_of(totals), tuple(totals)

    def aggregate(self, exchanged, state, moment, has_gradient):
        """Returns the gradients to apply; see `SparseStep.aggregate`."""
        [total] = exchanged
        aggregate = self._apply(total, state.shared, moment, has_gradient)
        return self._buffer.split(aggregate)

    @tf.function(jit_compile=True, autograph=False)
    def _accumulate(self, vectors, shared, moment, has_gradient):
        g = tf.concat(vectors, axis=0)
        a, _ = self._error_feedback.accumulate(
            (), shared, g, self._step_at(moment)
        )
        missing = self._buffer.missing(has_gradient)
        return missing.clear(a) if missing else a

    @tf.function(jit_compile=True, autograph=False)
    def _apply(self, total, shared, moment, has_gradient):
        old = [variable.read_value() for variable in shared]
        aggregate, new = self._error_feedback.aggregate(
            old, total, self._step_at(moment)
        )
        if missing := self._buffer.missing(has_gradient):
            new = missing.keep_state(old, new)
        for variable, value in zip(shared, new, strict=True):
            variable.assign(value)
        return aggregate

    def _step_at(self, moment):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return error_feedback_lib.Step(replicas, 1.0, *moment)


def _flags_of(totals):
    return verdict.Flags(are_finite=finiteness.are_finite(totals))
