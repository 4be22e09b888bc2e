"""The exchange of cross gradients: `cross_gradients` with variables."""

from collections.abc import Sequence

import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.distribute import answers as answers_lib
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.kernels import tracing
from tf_regtopk.kernels import words
from tf_regtopk.steps import cross_gradients as cross_gradients_lib
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib


class CrossGradientStep:
    """Answers of the neighbours -> the gradient for the inner optimizer.

    Args:
        method: `round.Method` of `CrossGradients`.
        alpha: Float in [0, 1].
        num_replicas: N.
    """

    def __init__(
        self, method: round_lib.Method, alpha: float, num_replicas: int
    ) -> None:
        self._method = method
        self._alpha = alpha
        self._num_replicas = num_replicas

    def gradient(
        self,
        own: tf.Tensor,
        at_weights: Sequence[tf.Tensor],
        errors: Sequence[tf.Variable],
        number: tf.Tensor,
        neighbours: answers_lib.AnsweringNeighbours,
    ) -> tf.Tensor:
        """Returns the gradient for the inner optimizer of this replica.

        To be called in a replica context.

        Args:
            own: Float tensor `[J]`, the gradient at this replica's weights.
            at_weights: List of float tensors `[J]`, the gradients at the
                weights of each neighbour.
            errors: This replica's variables of residual errors: none, or one of
                the shape `[num_told_apart, J]`.
            number: Scalar integer tensor, the number of exchanges before.
            neighbours: `AnsweringNeighbours`.

        Returns:
            Float tensor `[J]`.
        """
        gradients = tf.stack(at_weights)
        answers = None
        if self._alpha > 0:
            rank = strategy_lib.replica_rank()
            with tf.device("CPU:0"):
                told_apart = words.hold(
                    tf.stack(
                        [neighbours.ranks(number), neighbours.numbers(number)]
                    )
                )
            with tf.name_scope("tf_regtopk/answer"):
                payloads, after = self.answers(
                    gradients,
                    tuple(variable.read_value() for variable in errors),
                    told_apart,
                    number,
                    rank,
                )
                for variable, value in zip(errors, after, strict=True):
                    variable.assign(value)
            with tf.name_scope("tf_regtopk/exchange"):
                answers = neighbours.answer(payloads, number)
        with tf.name_scope("tf_regtopk/combine"):
            return self.combine(
                own, gradients, answers, neighbours.taken(number)
            )

    @tracing.compiled
    def answers(
        self,
        gradients: tf.Tensor,
        errors: tuple[tf.Tensor, ...],
        told_apart: tf.Tensor,
        number: tf.Tensor,
        rank: tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Makes the payloads for all neighbours.

        Args:
            gradients: Float tensor `[D, J]`, one for each neighbour.
            errors: None or one float tensor `[num_told_apart, J]`.
            told_apart: Tensor `[2, D]` of held words: the ranks of the
                neighbours, and the numbers by which this replica knows them.
            number: As of `gradient`.
            rank: Scalar int32 tensor, the rank of this replica.

        Returns:
            `(payloads, errors)`: a tensor `[D, length]` of held words, and the
            residual errors after.
        """
        ranks, numbers = tf.unstack(words.release(told_apart, tf.int32))
        context = error_feedback_lib.StepContext(
            self._num_replicas, 1.0, tf.zeros([]), number
        )
        found = cross_gradients_lib.answer(
            self._method, gradients, errors, (ranks, numbers), context, rank
        )
        return words.hold(found.payloads), found.errors

    @tracing.compiled
    def combine(
        self,
        own: tf.Tensor,
        at_weights: tf.Tensor,
        answers: tf.Tensor | None,
        taken: tf.Tensor,
    ) -> tf.Tensor:
        """`cross_gradients.combine` with answers that are payloads.

        Args:
            own: As of `cross_gradients.combine`.
            at_weights: As of `cross_gradients.combine`.
            answers: Tensor `[D, length]` of held words, or None.
            taken: As of `cross_gradients.combine`.
        """
        decoded = None
        if answers is not None:
            _, decoded, _ = self._method.payload_codec.decode(
                words.release(answers, tf.int32)
            )
        return cross_gradients_lib.combine(
            self._alpha, own, at_weights, decoded, taken
        )


class Crossing:
    """The exchange of cross gradients.

    Args:
        cross_gradients: `CrossGradients`.
        buffer: `FlatBuffer` of the variables.
        neighbours: `AnsweringNeighbours`.
        num_replicas: N.
    """

    def __init__(
        self,
        cross_gradients: cross_gradients_lib.CrossGradients,
        buffer: flat_buffer.FlatBuffer,
        neighbours: answers_lib.AnsweringNeighbours,
        num_replicas: int,
    ) -> None:
        self.neighbours = neighbours
        self._buffer = buffer
        self._keeps_errors = cross_gradients.keeps_errors
        self._step = tracing.of_equal(
            CrossGradientStep,
            cross_gradients.method(buffer.size, buffer.dtype),
            cross_gradients.alpha,
            num_replicas,
        )

    def initial_errors(self) -> tuple[tf.Tensor, ...]:
        """The residual errors to start with, a row for each neighbour."""
        if not self._keeps_errors:
            return ()
        shape = [self.neighbours.num_told_apart, self._buffer.size]
        return (tf.zeros(shape, self._buffer.dtype),)

    def gradient(
        self,
        own: tf.Tensor,
        at_weights: Sequence[tf.Tensor],
        errors: Sequence[tf.Variable],
        number: tf.Tensor,
    ) -> tf.Tensor:
        """See `CrossGradientStep.gradient`."""
        return self._step.gradient(
            own, at_weights, errors, number, self.neighbours
        )
