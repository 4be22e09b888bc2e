r"""Cross gradients: those at the weights, or on the data, of neighbours.

Replica i has the weights x_i, and the loss F_i of a batch of its own:

    grad F_i(x_j)     the model-variant cross gradient: i computes it itself,
                      because x_j is what j sends anyway
    grad F_j(x_i)     the data-variant one: j computes it, and sends it back

    g_i = (1 - alpha) sum over j of W_ij grad F_i(x_j)
          + alpha sum over j of W_ij C_j(grad F_j(x_i))      j = i included

where C_j is what the codec of j makes of it, with error feedback for each of
its neighbours, and C_i changes nothing. g_i is what the inner optimizer gets.
"""

import dataclasses
from typing import NamedTuple

import keras
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import hyper_parameters
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk import validation
from tf_regtopk.steps import round as round_lib

_RULES = (error_feedback_lib.NoFeedback(), error_feedback_lib.Accumulate())


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class CrossGradients(hyper_parameters.HyperParameters):
    r"""Steps that also heed the neighbours' weights, or their data.

    For `DecentralizedOptimizer`, where replicas have data that differ much.
    With x_i the weights of replica i, F_i the loss of its batch, and W the
    mixing matrix, the inner optimizer of i gets in place of grad F_i(x_i)

        g_i = (1 - alpha) sum over j of W_ij grad F_i(x_j)
              + alpha sum over j of W_ij C(grad F_j(x_i))    j = i included

    where C changes nothing for j = i. Each replica takes the gradient of its
    batch at the weights of each of its neighbours, which is one more forward
    and backward pass for each. (All replicas take as many passes as the one
    with the most neighbours in any step.)
    Where alpha > 0 it sends the result back to that neighbour, as the codec C
    writes it: one payload more for each that is sent. With plain values this is
    NGC, and with `Codec(values="sign")` CompNGC.

    The model has to know the loss at other weights: its class derives from
    `CrossGradientTraining`. (A training loop of your own uses
    `DecentralizedOptimizer.with_gradients_at`.) All weights are exchanged in
    each step and as they are, so that the optimizer has the defaults for
    `sparsifier`, `codec`, `error_feedback`, `mixing_rule` and
    `communication_period`.

    Args:
        alpha: Float in [0, 1], the part of the neighbours' data. With 0 there
            is none, and no more bytes than without cross gradients.
        codec: `Codec` of the gradients that are sent back. All their entries
            are, so that it has no indices to write.
        error_feedback: `Accumulate()` or `NoFeedback()`, what becomes of what
            the codec rounds away. With `Accumulate()` each replica keeps a
            residual error for each of its neighbours (and none where the codec
            rounds nothing).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> CrossGradients(codec=codecs.Codec(values="sign")).sends_back
    True
    >>> CrossGradients(alpha=0).sends_back
    False

    Source: Aketi, Kodge, Roy, "Neighborhood Gradient Clustering: An Efficient
    Decentralized Learning Method for Non-IID Data Distributions" (2022).
    """

    alpha: float = 1.0
    codec: codecs.Codec = dataclasses.field(default_factory=codecs.Codec)
    error_feedback: error_feedback_lib.ErrorFeedback = dataclasses.field(
        default_factory=error_feedback_lib.Accumulate
    )

    def __post_init__(self) -> None:
        self._check_number("alpha", "in [0, 1]", lambda alpha: 0 <= alpha <= 1)
        validation.check_instance(
            "codec", self.codec, codecs.Codec, 'Codec(values="sign")'
        )
        if self.error_feedback not in _RULES:
            raise ValueError(
                "`error_feedback` of `CrossGradients` must be `Accumulate()` "
                "or `NoFeedback()`, with its defaults. Received: "
                f"error_feedback={self.error_feedback!r}"
            )

    @property
    def sends_back(self) -> bool:
        """True if replicas send gradients to the neighbours."""
        return self.alpha > 0

    @property
    def keeps_errors(self) -> bool:
        """True if a replica keeps a residual error for each neighbour."""
        values = self.codec.payload(k=1, size=1).values
        return (
            self.sends_back
            and self.error_feedback != error_feedback_lib.NoFeedback()
            and not isinstance(values, codecs.Float32)
        )

    def method(self, size: int, dtype: tf.DType) -> round_lib.Method:
        """The parts by which a gradient is sent back.

        Args:
            size: J.
            dtype: float32 or float64.

        Returns:
            `round.Method`.
        """
        return round_lib.Method(
            sparsifiers.Dense(),
            self.error_feedback
            if self.keeps_errors
            else error_feedback_lib.NoFeedback(),
            self.codec.payload(size, size, dtype),
            (selection.Group(size, size),),
        )

    def sent_bytes(self, size: int, dtype: tf.DType) -> int:
        """Counts the bytes of an answer to one neighbour.

        Args:
            size: J.
            dtype: float32 or float64.
        """
        if not self.sends_back:
            return 0
        return 4 * self.codec.payload(size, size, dtype).num_words


class Answers(NamedTuple):
    """The gradients that a replica sends back to its D neighbours.

    Args:
        payloads: int32 tensor `[D, length]`.
        values: Float tensor `[D, J]`, as the neighbours decode them.
        errors: Tuple of the tensors of residual errors, after the step.
    """

    payloads: tf.Tensor
    values: tf.Tensor
    errors: tuple[tf.Tensor, ...]


def answer(
    method: round_lib.Method,
    gradients: tf.Tensor,
    errors: tuple[tf.Tensor, ...],
    neighbours: tuple[tf.Tensor, tf.Tensor],
    context: error_feedback_lib.StepContext,
    rank: tf.Tensor,
) -> Answers:
    """Makes what a replica sends back, with an error for each neighbour.

        a = e_j + grad F_i(x_j),   e_j = a - C(a)      for each neighbour j

    Args:
        method: `round.Method`, from `CrossGradients.method`.
        gradients: Float tensor `[D, J]`, one for each neighbour.
        errors: Tuple of none or of one float tensor `[rows, J]`.
        neighbours: `(ranks, numbers)`, int32 tensors `[D]`: the ranks of the
            neighbours, and the rows of their errors. The rank of the replica
            itself stands for nobody.
        context: `StepContext`.
        rank: Scalar int32 tensor, the rank of the replica.

    Returns:
        `Answers`.
    """
    ranks, numbers = neighbours
    payloads, values, after = [], [], []
    for d, gradient in enumerate(tf.unstack(gradients)):
        before = round_lib.State(
            tuple(tf.gather(e, numbers[d]) for e in errors)
        )
        # Each pair of replicas rounds by random numbers of its own.
        stream = rank * context.num_replicas + ranks[d]
        payload, sent, _ = round_lib.send(
            method, gradient, before, context, stream
        )
        local, _ = round_lib.settle(method, sent, (), gradient, context)
        payloads.append(payload)
        values.append(sent.values)
        after.append(local)
    is_somebody = tf.not_equal(ranks, rank)[:, tf.newaxis]
    return Answers(
        tf.stack(payloads),
        tf.stack(values),
        tuple(
            tf.tensor_scatter_nd_update(
                e,
                numbers[:, tf.newaxis],
                tf.where(is_somebody, tf.stack(rows), tf.zeros_like(gradients)),
            )
            for e, rows in zip(errors, zip(*after, strict=True), strict=True)
        ),
    )


def combine(
    alpha: float,
    own: tf.Tensor,
    at_weights: tf.Tensor,
    answers: tf.Tensor | None,
    taken: tf.Tensor,
) -> tf.Tensor:
    """Makes the gradient for the inner optimizer of replica i.

        g_i = W_ii grad F_i(x_i) + sum over j of W_ij (
            (1 - alpha) grad F_i(x_j) + alpha grad F_j(x_i))

    Args:
        alpha: Float in [0, 1].
        own: Float tensor `[J]`, grad F_i(x_i).
        at_weights: Float tensor `[D, J]`, grad F_i(x_j) for each neighbour j.
        answers: Float tensor `[D, J]`, grad F_j(x_i); None if alpha is 0.
        taken: Float tensor `[D]`, W_ij.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> own, at_weights = tf.constant([4.0]), tf.constant([[1.0]])
    >>> answers, taken = tf.constant([[2.0]]), tf.constant([0.5])
    >>> combine(1.0, own, at_weights, answers, taken).numpy()
    array([3.], dtype=float32)
    >>> combine(0.0, own, at_weights, None, taken).numpy()
    array([2.5], dtype=float32)
    """
    of_neighbours = at_weights
    if answers is not None:
        of_neighbours = (1 - alpha) * at_weights + alpha * answers
    taken = tf.cast(taken, own.dtype)
    return (1 - tf.reduce_sum(taken)) * own + tf.reduce_sum(
        taken[:, tf.newaxis] * of_neighbours, axis=0
    )
