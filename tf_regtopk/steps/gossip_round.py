r"""A step of decentralised training on one replica, as pure functions.

Replica i sends of its weights x_i what it would send of a gradient, and moves
towards those of its neighbours:

    payload, sent_i = round.send(method, x_i, state_i, context)
    d_i             = sum over j of (W - I)_ij sent_j         `MixingRule`
    x_i            += gamma aggregate(state_i, d_i)           mix

The rule of error feedback names the method:

    NoFeedback      x_i += gamma sum of (W - I)_ij sent_j     D-PSGD
    EF21            sent_i = C(x_i - h_i),  h_i += sent_i     CHOCO-SGD
                    x_i += gamma sum of (W - I)_ij h_j
    Accumulate      sent_i = C(x_i + e_i),  e_i = what C has left out
                    x_i += gamma sum of (W - I)_ij sent_j     DeepSqueeze

Sources: Lian et al., "Can Decentralized Algorithms Outperform Centralized
Algorithms?" (2017); Koloskova, Stich, Jaggi, "Decentralized Stochastic
Optimization and Gossip Algorithms with Compressed Communication" (2019); Tang
et al., "DeepSqueeze" (2019).
"""

import tensorflow as tf

from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk.steps import round as round_lib


def initial(
    error_feedback: error_feedback_lib.ErrorFeedback, x: tf.Tensor
) -> round_lib.State:
    """Returns the state of a replica before the first step.

    Args:
        error_feedback: `NoFeedback`, `EF21` or `Accumulate`, as they are by
            default.
        x: Float tensor `[J]`, the weights that all replicas start with.

    Returns:
        `round.State`. What the neighbours know of x, the h of `EF21`, is x.

    Example:

    >>> state = initial(error_feedback_lib.EF21(), tf.constant([1.0, 2.0]))
    >>> state.local[0].numpy(), state.shared[0].numpy()
    (array([1., 2.], dtype=float32), array([0., 0.], dtype=float32))
    """
    local = error_feedback.initial_local(x.shape[0], x.dtype)
    if isinstance(error_feedback, error_feedback_lib.EF21):
        local = (x, *local[1:])
    return round_lib.State(
        local, error_feedback.initial_shared(x.shape[0], x.dtype)
    )


def mix(
    method: round_lib.Method,
    consensus_step_size: float,
    d: tf.Tensor,
    sent: round_lib.Sent,
    state: round_lib.State,
    context: error_feedback_lib.StepContext,
) -> tuple[tf.Tensor, round_lib.State]:
    """Moves a replica towards its neighbours.

    Args:
        method: `round.Method`.
        consensus_step_size: Float gamma.
        d: Float tensor `[J]`, from `MixingRule.disagreement`.
        sent: `round.Sent`, from `round.send` of the weights.
        state: `round.State` before the step.
        context: `StepContext`.

    Returns:
        `(move, state)`: a float tensor `[J]`, what is to be added to x, and the
        `round.State` after the step. Tensors that stay as they are are the same
        objects.
    """
    aggregate, shared = round_lib.aggregate(method, d, state.shared, context)
    local, memory = round_lib.settle(method, sent, state.memory, d, context)
    return (
        tf.cast(consensus_step_size, d.dtype) * aggregate,
        round_lib.State(local, shared, memory),
    )
