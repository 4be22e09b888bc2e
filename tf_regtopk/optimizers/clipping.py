"""Clipping that an inner optimizer has of its own."""

import warnings

import keras

from tf_regtopk import error_feedback as error_feedback_lib

_NAMES = ("clipnorm", "clipvalue", "global_clipnorm")


def clips(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether a Keras optimizer clips gradients.

    Args:
        optimizer: A Keras optimizer.

    Example:

    >>> clips(keras.optimizers.SGD()), clips(keras.optimizers.SGD(clipnorm=1.0))
    (False, True)
    """
    return any(getattr(optimizer, name, None) is not None for name in _NAMES)


def warn_if_after_momentum(
    optimizer: keras.optimizers.Optimizer,
    error_feedback: error_feedback_lib.ErrorFeedback,
) -> None:
    """Warns if what an optimizer clips has the momentum of a rule in it.

    Keras clips gradients before momentum m, which makes updates up to
    1 / (1 - m) times as large as a clipped gradient. An aggregate that is
    clipped after momentum stays as small as that gradient.
    """
    if clips(optimizer) and error_feedback.has_momentum:
        warnings.warn(
            "The `inner_optimizer` clips the aggregate, after the momentum of "
            "`error_feedback`, where Keras clips gradients before momentum: "
            'updates may be much smaller. Set `clipping="replica"`, which '
            "clips each replica's gradient before the momentum. Received: "
            f"error_feedback={error_feedback} and a clipping "
            f"{type(optimizer).__name__}",
            stacklevel=3,
        )
