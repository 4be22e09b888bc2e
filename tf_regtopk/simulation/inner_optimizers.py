"""Descents of Keras's optimizers, as pure functions."""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import keras
import tensorflow as tf

# What Keras adds to the equations of an optimizer.
_INNER = {
    "weight_decay": None,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "gradient_accumulation_steps": None,
    "loss_scale_factor": None,
}


class MomentumSGD(NamedTuple):
    """The descent of `keras.optimizers.SGD`.

        v = momentum v + rate g,        weights = weights - v

    Args:
        momentum: Float in [0, 1).
    """

    momentum: float = 0.0

    @property
    def num_arrays(self) -> int:
        """Number of arrays of the weights' size that it keeps."""
        return 1

    def __call__(
        self,
        arrays: tuple[tf.Tensor, ...],
        g: tf.Tensor,
        t: tf.Tensor,
        rate: float | tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Returns the change to subtract.

        Args:
            arrays: Tuple of what it keeps; zeros at first.
            g: Float tensor `[J]`.
            t: Scalar int32 tensor, the number of steps before.
            rate: Scalar, the learning rate.

        Returns:
            `(change, arrays)`.
        """
        del t
        v = self.momentum * arrays[0] + rate * g
        return v, (v,)


class Adam(NamedTuple):
    """The descent of `keras.optimizers.Adam`, called like `MomentumSGD`.

        m = beta_1 m + (1 - beta_1) g,      v = beta_2 v + (1 - beta_2) g^2
        scale = rate sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))
        weights = weights - scale m / (sqrt(v) + eps)

    Args:
        beta_1: Float in [0, 1).
        beta_2: Float in [0, 1).
        epsilon: Positive float.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    @property
    def num_arrays(self) -> int:
        """Number of arrays kept between steps."""
        return 2

    def __call__(
        self,
        arrays: tuple[tf.Tensor, ...],
        g: tf.Tensor,
        t: tf.Tensor,
        rate: float | tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """Returns the change to subtract, see `MomentumSGD`."""
        m, v = arrays
        m = self.beta_1 * m + (1 - self.beta_1) * g
        v = self.beta_2 * v + (1 - self.beta_2) * g**2
        power = tf.cast(t + 1, g.dtype)
        scale = tf.sqrt(1 - self.beta_2**power) / (1 - self.beta_1**power)
        return rate * (scale * m / (tf.sqrt(v) + self.epsilon)), (m, v)


Inner: TypeAlias = MomentumSGD | Adam


def inner_of(optimizer: keras.optimizers.Optimizer) -> Inner:
    """Returns the equations of a Keras optimizer.

    Args:
        optimizer: `keras.optimizers.SGD` or `keras.optimizers.Adam`.

    Raises:
        TypeError: If it is another one.
        ValueError: If it has an option that is not simulated.
    """
    # A subclass may have other equations.
    if type(optimizer) is keras.optimizers.SGD:
        check_options(optimizer, {**_INNER, "nesterov": False})
        return MomentumSGD(optimizer.momentum)
    if type(optimizer) is keras.optimizers.Adam:
        check_options(optimizer, {**_INNER, "amsgrad": False})
        return Adam(optimizer.beta_1, optimizer.beta_2, optimizer.epsilon)
    raise TypeError(
        "`optimizer` must be `keras.optimizers.SGD`, `keras.optimizers.Adam`, "
        "or `SparsifiedOptimizer` around one of them. "
        f"Received: optimizer={optimizer!r}"
    )


def check_options(
    optimizer: keras.optimizers.Optimizer, expected: Mapping[str, Any]
) -> None:
    """Raises unless the options of an optimizer are those expected.

    Args:
        optimizer: Keras optimizer.
        expected: Values by the names of the options.

    Raises:
        ValueError: If one of them has another value.
    """
    for name, value in expected.items():
        received = getattr(optimizer, name)
        if received != value:
            raise ValueError(
                f"`{name}` must be {value!r} in a simulation. "
                f"Received: {name}={received!r}"
            )
