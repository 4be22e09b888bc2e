r"""Published methods, each with all of its parts set at once.

A method is a function that returns a `SparsifiedOptimizer`, for `compile`:

    model.compile(
        optimizer=tf_regtopk.methods.deep_gradient_compression(
            0.1, momentum=0.9, density=0.001),
        loss="sparse_categorical_crossentropy")

Each function chooses the inner optimizer, the sparsifier, the rule of error
feedback and the codec as its paper does. (RegTop-k, of which this library is an
implementation, is `SparsifiedOptimizer` with its defaults.)
"""

from typing import Any
from typing import TypeAlias

import keras

from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk import sparsifiers
from tf_regtopk.optimizers import momentum as momentum_lib
from tf_regtopk.optimizers import sparsified

# What applies the aggregate: the learning rate of plain SGD, or an optimizer.
Inner: TypeAlias = (
    float
    | keras.optimizers.schedules.LearningRateSchedule
    | keras.optimizers.Optimizer
)


def deep_gradient_compression(
    inner: Inner,
    momentum: float = 0.9,
    density: float = 0.001,
    *,
    clip_norm: float | None = None,
    **options: Any,
) -> sparsified.SparsifiedOptimizer:
    r"""Deep Gradient Compression: Top-k of locally accumulated momentum.

        u = m u + g,        a = e + u
        e = a,  u = u,      both 0 where an entry was sent

    `DensityWarmup` is its warm-up of the density.

    Args:
        inner: The learning rate of SGD: a float or a schedule. Or a Keras
            optimizer without momentum.
        momentum: Float m in [0, 1). With 0 it is Top-k with error accumulation.
        density: Float in (0, 1]. The share of the entries that is sent.
        clip_norm: Positive float, or None. The norm to which the sum of the
            gradients is clipped, as of `Accumulate`.
        **options: Other arguments of `SparsifiedOptimizer`, such as `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        ValueError: If an argument breaks its rule, or `inner` has momentum of
            its own.

    Example:

    >>> optimizer = deep_gradient_compression(0.1, momentum=0.9, density=0.01)
    >>> optimizer.sparsifier
    TopK(density=0.01)

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression: Reducing the
    Communication Bandwidth for Distributed Training" (2018).
    """
    return sparsified.SparsifiedOptimizer(
        _inner_optimizer(inner, has_momentum=momentum > 0),
        sparsifiers.TopK(density),
        error_feedback=error_feedback.Accumulate(
            momentum, factor_masking=momentum > 0, clip_norm=clip_norm
        ),
        **options,
    )


def ef21_sgdm(
    inner: Inner,
    eta: float = 0.1,
    density: float = 0.001,
    **options: Any,
) -> sparsified.SparsifiedOptimizer:
    r"""EF21-SGDM: Top-k of what changes in a mean of the local gradients.

        v = (1 - eta) v + eta g,    h = h + sent,   aggregate = sum of all h

    Args:
        inner: The learning rate of SGD: a float or a schedule. Or a Keras
            optimizer without momentum. Because v is a mean, steps are as long
            as those of SGD with the momentum 1 - eta if the learning rate is
            1 / eta times as large.
        eta: Float in (0, 1]. With 1 it is EF21.
        density: Float in (0, 1]. The share of the entries that is sent.
        **options: Other arguments of `SparsifiedOptimizer`, such as `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        ValueError: If an argument breaks its rule, or `inner` has momentum of
            its own.

    Example:

    >>> ef21_sgdm(1.0, eta=0.1).error_feedback
    EF21(momentum=0.1)

    Source: Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error
    Feedback!" (2023).
    """
    return sparsified.SparsifiedOptimizer(
        _inner_optimizer(inner, has_momentum=eta < 1),
        sparsifiers.TopK(density),
        error_feedback=error_feedback.EF21(eta),
        **options,
    )


def sparse_ternary_compression(
    inner: Inner,
    density: float = 0.01,
    *,
    downlink_density: float | None = None,
    **options: Any,
) -> sparsified.SparsifiedOptimizer:
    r"""Sparse ternary compression, of the gradients and of their sum.

        a = e + g,      sent = mean |a_s| sign(a_s),    e = a - sent
        A = E + total,  aggregate alike of A,           E = A - aggregate

    The indices s are those of the largest magnitudes, as Golomb codes. An
    all-gather has no way back, and the second line saves no byte.

    Args:
        inner: The learning rate of SGD: a float or a schedule. Or a Keras
            optimizer.
        density: Float in (0, 1]. The share of the entries that is sent.
        downlink_density: Float in (0, 1], that of the sum; None for `density`.
        **options: Other arguments of `SparsifiedOptimizer`, but `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:

    >>> sparse_ternary_compression(0.1).codec
    Codec(indices='golomb', values='ternary')

    Source: Sattler, Wiedemann, Mueller, Samek, "Robust and
    Communication-Efficient Federated Learning from Non-IID Data" (2019).
    """
    return sparsified.SparsifiedOptimizer(
        _inner_optimizer(inner, has_momentum=False),
        sparsifiers.TopK(density),
        codec=codecs.Codec("golomb", "ternary"),
        error_feedback=error_feedback.CompressedDownlink(
            density=downlink_density
        ),
        **options,
    )


def _inner_optimizer(
    inner: Inner, has_momentum: bool
) -> keras.optimizers.Optimizer:
    """Returns what applies the aggregate of a method.

    Args:
        inner: As of the methods.
        has_momentum: Whether the method has momentum of its own.
    """
    if not isinstance(inner, keras.optimizers.Optimizer):
        return keras.optimizers.SGD(inner)
    momentum = momentum_lib.momentum_of(inner)
    if momentum and has_momentum:
        raise ValueError(
            "`inner` must have no momentum, because the method applies its own "
            "on each replica: give the learning rate, or an optimizer such as "
            "`keras.optimizers.RMSprop(0.001)`. Received: a "
            f"{type(inner).__name__} with a momentum of {momentum:g}"
        )
    return inner
