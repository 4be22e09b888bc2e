r"""A step of one replica, as pure functions of plain values.

    payload, sent, a  = send(method, gradient, state, context, rank)
    total             = sum of what all participants sent           exchange
    aggregate, shared = aggregate(method, total, shared, context)
    local, memory     = settle(method, sent, memory, total, context)

There are two halves because the entries of the other replicas arrive between
them, and because nothing that a replica keeps may change before all of them
know that the step is taken. The optimizer, the simulation, the benchmarks and
the exported programs call these functions.
"""

from typing import NamedTuple

import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk import training_validation
from tf_regtopk.steps import missing as missing_lib


class Method(NamedTuple):
    """The parts of a step, for gradients of one size.

    Args:
        sparsifier: `Sparsifier`.
        error_feedback: `ErrorFeedback`.
        payload_codec: `PayloadCodec` for the k of all groups, or
            `ScatteredCodec`.
        groups: Tuple of `selection.Group`, whose sizes add up to J.
    """

    sparsifier: sparsifiers.Sparsifier
    error_feedback: error_feedback_lib.ErrorFeedback
    payload_codec: codecs.PayloadCodec | codecs.ScatteredCodec
    groups: tuple[selection.Group, ...]


class State(NamedTuple):
    """Everything that a replica keeps between steps.

    Args:
        local: Tuple of tensors `[J]`, the replica's own of the error feedback.
        shared: Tuple of tensors, those of the error feedback that are the same
            on all replicas.
        memory: Tuple of tensors, what the sparsifier remembers.
        measured: Tuple of tensors, the numbers that `telemetry` found in the
            last step, if it was asked for. They are of no use to the next one.
    """

    local: tuple[tf.Tensor, ...] = ()
    shared: tuple[tf.Tensor, ...] = ()
    memory: tuple[tf.Tensor, ...] = ()
    measured: tuple[tf.Tensor, ...] = ()

    def read(self) -> "State":
        """Returns the `State` of the values that a state of variables has."""
        return State(*tf.nest.map_structure(lambda v: v.read_value(), self))


class Sent(NamedTuple):
    """Everything that a replica holds while others' entries are on the way.

    Args:
        indices: int32 tensor `[k]`, rising.
        values: Float tensor `[k]`, as the receivers decode them.
        local: The tuple of local tensors that the second half starts with.
    """

    indices: tf.Tensor
    values: tf.Tensor
    local: tuple[tf.Tensor, ...]


class TakenOver(NamedTuple):
    """Errors of the sum that a replica takes over, where it owns entries.

    Args:
        indices: int32 tensor `[n]`, each once.
        error: Float tensor `[n]`, the sums less what is in the total.
    """

    indices: tf.Tensor
    error: tf.Tensor


def send(
    method: Method,
    gradient: tf.Tensor,
    state: State,
    context: error_feedback_lib.StepContext,
    rank: tf.Tensor,
    missing: missing_lib.Missing | None = None,
) -> tuple[tf.Tensor, Sent, tf.Tensor]:
    """Accumulates, scores, selects and encodes, on one replica.

        a       = accumulate(state, g)
        s       = the k entries of a with the largest |scores|
        payload = encode(s, a_s)

    Args:
        method: `Method`.
        gradient: Float tensor `[J]`.
        state: `State`.
        context: `StepContext`.
        rank: Scalar int32 tensor, the participant's number, for stochastic
            rounding.
        missing: The entries without a gradient, if there are any. They send
            nothing and keep their state.

    Returns:
        `(payload, sent, a)`: an int32 tensor `[num_words]`, `Sent`, and the
        accumulated gradient `[J]`.

    Example:

    >>> method = Method(
    ...     sparsifiers.TopK(density=0.5),
    ...     error_feedback_lib.Accumulate(),
    ...     codecs.Codec("int32").payload(k=1, size=2),
    ...     (selection.Group(size=2, k=1),))
    >>> state = State(local=(tf.constant([0.5, 1.0]),))
    >>> context = error_feedback_lib.StepContext(
    ...     1, 0.5, tf.zeros([]), tf.constant(0))
    >>> _, sent, a = send(
    ...     method, tf.constant([0.0, 1.0]), state, context, tf.constant(0))
    >>> a.numpy().tolist(), sent.indices.numpy(), sent.values.numpy()
    ([0.5, 2.0], array([1], dtype=int32), array([2.], dtype=float32))
    """
    accumulated, local = method.error_feedback.accumulate(
        state.local, state.shared, gradient, context
    )
    training_validation.check_local_state(
        f"{type(method.error_feedback).__name__}.accumulate", local, state.local
    )
    a = missing.clear(accumulated) if missing else accumulated
    scores = method.sparsifier.score(a, state.memory, context.number)
    training_validation.check_scores(scores, a)
    indices = selection.select_largest(scores, method.groups, context.number)
    a = method.sparsifier.restore(a, scores, state.memory, indices)
    # A rule that keeps a gets the restored a, because XLA may have written the
    # scores over the accumulated one.
    local = tuple(a if tensor is accumulated else tensor for tensor in local)
    if missing:
        local = missing.keep_state(state.local, local)
    payload, values = method.payload_codec.encode(
        indices, selection.take(a, indices), (context.number, rank)
    )
    return payload, Sent(indices, values, local), a


def aggregate(
    method: Method,
    total: tf.Tensor,
    shared: tuple[tf.Tensor, ...],
    context: error_feedback_lib.StepContext,
    missing: missing_lib.Missing | None = None,
) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
    """Turns the total into the gradient that the inner optimizer sees.

    Args:
        method: `Method`.
        total: Float tensor `[J]`, the sum of what all replicas sent; 0 where
            gradients are missing.
        shared: The shared tensors of the `State` before the step.
        context: `StepContext`.
        missing: As of `send`.

    Returns:
        `(aggregate, shared)`: a float tensor `[J]` and the shared tensors after
        the step, the same on all replicas. Tensors that stay as they are are
        the same objects.
    """
    aggregated, after = method.error_feedback.aggregate(shared, total, context)
    if missing:
        after = missing.keep_state(shared, after)
    return aggregated, tuple(after)


def settle(
    method: Method,
    sent: Sent,
    memory: tuple[tf.Tensor, ...],
    total: tf.Tensor,
    context: error_feedback_lib.StepContext,
    missing: missing_lib.Missing | None = None,
    taken_over: TakenOver | None = None,
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    """Clears the error and remembers what became of the entries, on a replica.

        local  = update(local, sent, total)
        local  = add_error(local, taken_over)           of an owner
        memory = remember(memory, sent, total at s)

    Args:
        method: `Method`.
        sent: `Sent`, from `send`.
        memory: The memory of the `State` before the step.
        total: As of `aggregate`.
        context: `StepContext`.
        missing: As of `send`.
        taken_over: `TakenOver`, if entries were summed on the way. What has
            been sent then counts only where the total is not 0.

    Returns:
        `(local, memory)` of the `State` after the step. Tensors that stay as
        they are are the same objects.
    """
    indices, values, local = sent
    if taken_over:
        is_accepted = selection.take(total, indices) != 0
        values = tf.where(is_accepted, values, tf.zeros_like(values))
    remembered = method.sparsifier.remember(
        memory,
        indices,
        missing.applied(indices, values) if missing else values,
        selection.take(total, indices),
        context.number,
    )
    training_validation.check_memory(
        f"{type(method.sparsifier).__name__}.remember", remembered, memory
    )
    after = method.error_feedback.update(local, indices, values, total, context)
    training_validation.check_local_state(
        f"{type(method.error_feedback).__name__}.update", after, local
    )
    if taken_over:
        after = method.error_feedback.add_error(
            tuple(after), *taken_over, total, context
        )
        training_validation.check_local_state(
            f"{type(method.error_feedback).__name__}.add_error", after, local
        )
    if missing:
        after = missing.keep_state(local, after)
    return tuple(after), remembered
