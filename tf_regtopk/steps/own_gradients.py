"""The gradients of a replica's own loss, as it is without a scale."""

from collections.abc import Callable
from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_regtopk.steps import finiteness
from tf_regtopk.steps import flat_buffer


def own_gradients(
    gradients: Sequence[flat_buffer.Gradient], num_replicas: int
) -> tuple[list[flat_buffer.Gradient], tf.Tensor]:
    """Returns the gradients of this replica's own loss; zeros if not finite.

        N g, as Keras divides the loss by the number N of replicas

    Args:
        gradients: List of gradients g of the divided loss, or None.
        num_replicas: N.

    Returns:
        `(gradients, is_finite)`: a list like that given, and a scalar bool
        tensor, False if some number was NaN or infinite, and all are 0 now.

    Example:

    >>> gradients = [tf.constant([1.0, 2.0]), None]
    >>> (first, _), is_finite = own_gradients(gradients, 2)
    >>> first.numpy(), bool(is_finite)
    (array([2., 4.], dtype=float32), True)
    >>> (first, _), is_finite = own_gradients(
    ...     [tf.constant([1.0, float("nan")]), None], 2)
    >>> first.numpy(), bool(is_finite)
    (array([0., 0.], dtype=float32), False)
    """
    scaled = [_map(g, lambda values: values * num_replicas) for g in gradients]
    is_finite = finiteness.are_finite([g for g in scaled if g is not None])
    return [
        _map(g, lambda values: tf.where(is_finite, values, 0)) for g in scaled
    ], is_finite


def unscaled(
    gradients: Sequence[flat_buffer.Gradient],
    variables: Sequence[keras.Variable],
    scale: float | tf.Tensor,
) -> list[flat_buffer.Gradient]:
    """Divides gradients of a scaled loss by the scale.

    Args:
        gradients: List of gradients, or None.
        variables: List of their variables. What one with
            `overwrite_with_gradient` is to be stays as it is.
        scale: Positive float, or a scalar tensor.
    """

    def divide(values: tf.Tensor) -> tf.Tensor:
        # The scale may be too large for float16.
        wide = values.dtype if values.dtype.size >= 4 else tf.float32
        divided = tf.cast(values, wide) / tf.cast(scale, wide)
        return tf.cast(divided, values.dtype)

    return [
        gradient
        if getattr(variable, "overwrite_with_gradient", False)
        else _map(gradient, divide)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def _map(
    gradient: flat_buffer.Gradient, function: Callable[[tf.Tensor], tf.Tensor]
) -> flat_buffer.Gradient:
    """A gradient whose values are those that a function returns."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            function(gradient.values), gradient.indices, gradient.dense_shape
        )
    return None if gradient is None else function(gradient)
