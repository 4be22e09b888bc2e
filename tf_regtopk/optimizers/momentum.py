"""Momentum that an inner optimizer has of its own."""

import warnings

import keras

from tf_regtopk import error_feedback as error_feedback_lib

# How Keras's optimizers name the decay of their mean of gradients.
_NAMES = ("momentum", "beta_1", "adam_beta_1")


def momentum_of(optimizer: keras.optimizers.Optimizer) -> float:
    """Returns the largest momentum of a Keras optimizer, 0 if it has none.

    Args:
        optimizer: A Keras optimizer; of a `MultiOptimizer` its parts count.

    Returns:
        Float.

    Example:

    >>> momentum_of(keras.optimizers.SGD(0.1)), momentum_of(
    ...     keras.optimizers.Adam())
    (0.0, 0.9)
    """
    parts = (optimizer, *getattr(optimizer, "optimizers", ()))
    found = [getattr(part, name, 0.0) for part in parts for name in _NAMES]
    return max(
        (float(value) for value in found if isinstance(value, float | int)),
        default=0.0,
    )


def warn_if_doubled(
    optimizer: keras.optimizers.Optimizer,
    error_feedback: error_feedback_lib.ErrorFeedback,
) -> None:
    """Warns if both a rule of error feedback and an optimizer have momentum.

    Saved models may be so, and are to load, so that this is no error.
    """
    momentum = momentum_of(optimizer)
    if momentum and error_feedback.has_momentum:
        warnings.warn(
            "Momentum is applied twice: by `error_feedback` on each replica, "
            "and by the `inner_optimizer` after the sum. Leave one of them "
            "out, as by `keras.optimizers.SGD(learning_rate)` without "
            f"momentum. Received: error_feedback={error_feedback} and "
            f"{type(optimizer).__name__} with a momentum of {momentum:g}",
            stacklevel=3,
        )
