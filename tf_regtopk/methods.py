r"""Complete methods: the recommended one, and published ones.

A method is a function that returns a `SparsifiedOptimizer`, for `compile`:

    model.compile(
        optimizer=tf_regtopk.methods.deep_gradient_compression(
            0.1, momentum=0.9, density=0.001),
        loss="sparse_categorical_crossentropy")

Each function chooses the inner optimizer, the sparsifier, the rule of error
feedback and the codec: `recommended` by the results of this library, the others
by their papers. (RegTop-k, of which this library is an implementation, is
`SparsifiedOptimizer` with its defaults.)
"""

from collections.abc import Iterator
import contextlib
from typing import Any
from typing import SupportsFloat
from typing import TypeAlias
import weakref

import keras

from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk import keras_internals
from tf_regtopk import sparsifiers
from tf_regtopk import validation
from tf_regtopk.log import logger
from tf_regtopk.optimizers import clipping
from tf_regtopk.optimizers import momentum as momentum_lib
from tf_regtopk.optimizers import sparsified
from tf_regtopk.sizes import recommended as recommended_sizes

# What applies the aggregate: the learning rate of plain SGD, or an optimizer.
Inner: TypeAlias = (
    float
    | keras.optimizers.schedules.LearningRateSchedule
    | keras.optimizers.Optimizer
)


def recommended(
    inner: Inner,
    momentum: float | None = None,
    compression: float = recommended_sizes.COMPRESSION,
    **options: Any,
) -> sparsified.SparsifiedOptimizer:
    r"""The most accurate setting found for a given number of bytes.

    RegTop-k with the learned shift, and one bit a value: the bytes that are
    saved on values pay for about four times as many entries. The momentum of a
    gradient is added to the residual error at once, because entries wait there
    for many steps anyway. Adam moves to the replicas as a whole, see
    `LocalAdam`. The learning rate stays that of training without compression.
    Where the replicas' data differ and the learning rate decays,
    the callback `DensityDecay` gains accuracy at the same bytes.

    Args:
        inner: The learning rate of SGD: a float or a schedule. Or a Keras
            optimizer: the momentum of `keras.optimizers.SGD` is moved to the
            replicas, where it multiplies gradients by 1 / (1 - momentum), and
            becomes 0 in that optimizer; in the place of `keras.optimizers.Adam`
            or `AdamW` comes an SGD with its learning rate, weight decay and
            other settings. Others, also with `amsgrad`, act after the sum, as
            they do without compression, and a warning says so. If the optimizer
            clips, it clips the gradient of each replica, as plain Keras does.
        momentum: Float in [0, 1), the momentum on each replica. None is that of
            `inner` if `inner` is `keras.optimizers.SGD`, 0.9 if it is a
            learning rate, and 0 with any other optimizer. With 0 Adam acts
            after the sum.
        compression: Float of at least 40. The bytes of a float32 gradient,
            divided by those of a payload of a replica. (N replicas receive N
            payloads each by an all-gather, and about 2 gradients by a dense
            all-reduce: so all bytes fall by 2 / N times this factor.
            `wire_report` counts both.)
        **options: Other arguments of `SparsifiedOptimizer`, but `sparsifier`,
            `codec` and `error_feedback`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        TypeError: If `inner` is neither a learning rate nor an optimizer, or an
            option is what the method chooses.
        ValueError: If an argument breaks its rule, if momentum is given twice,
            or if it or Adam cannot be moved.

    Example:

    >>> optimizer = recommended(keras.optimizers.SGD(0.1, momentum=0.9))
    >>> optimizer.sparsifier.density, optimizer.codec.values
    (0.0113, 'sign')
    >>> optimizer.error_feedback
    LearnedShift(rate=None, momentum=0.9, factor_masking=False, at_once=True)
    >>> optimizer.inner_optimizer.momentum
    0.0

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD
    and other Gradient Compression Schemes" (2019), for the values.
    """
    for name in ("sparsifier", "codec", "error_feedback"):
        if name in options:
            raise TypeError(
                f"`{name}` must be left out, because the method chooses it: "
                "give it to `SparsifiedOptimizer`. Received: "
                f"{name}={options[name]}"
            )
    sparsifier = sparsifiers.RegTopK(recommended_sizes.density(compression))
    with _moved(inner, momentum) as (inner, rule):
        # Keras clips before momentum, and so does clipping on the replicas.
        if clipping.clips(inner):
            options = {"clipping": "replica", **options}
        return sparsified.SparsifiedOptimizer(
            inner,
            sparsifier,
            codec=codecs.Codec(values=recommended_sizes.VALUES),
            error_feedback=rule,
            **options,
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
        clip_norm: Positive float, or None. The norm to which gradients are
            clipped: that of each replica to `clip_norm / sqrt(N)`.
        **options: Other arguments of `SparsifiedOptimizer`, such as `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        TypeError: If `inner` is neither a learning rate nor an optimizer.
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
            optimizer without momentum. Because v is a mean, updates are as
            large as those of SGD with the momentum 1 - eta if the learning
            rate is 1 / eta times as large.
        eta: Float in (0, 1]. With 1 it is EF21.
        density: Float in (0, 1]. The share of the entries that is sent.
        **options: Other arguments of `SparsifiedOptimizer`, such as `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        TypeError: If `inner` is neither a learning rate nor an optimizer.
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
        A = E + total,  aggregate = mean |A_s| sign(A_s),
                                                        E = A - aggregate

    The indices s are those of the largest magnitudes, as Golomb codes. The
    second line saves no byte, because an all-gather sends no sum back.

    Args:
        inner: The learning rate of SGD: a float or a schedule. Or a Keras
            optimizer.
        density: Float in (0, 1]. The share of the entries that is sent.
        downlink_density: Float in (0, 1], that of the sum; None for `density`.
        **options: Other arguments of `SparsifiedOptimizer`, but `codec`.

    Returns:
        `SparsifiedOptimizer`.

    Raises:
        TypeError: If `inner` is neither a learning rate nor an optimizer.
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


_ADAMS = (keras.optimizers.Adam, keras.optimizers.AdamW)
_without_their_momentum: weakref.WeakSet[keras.optimizers.Optimizer] = (
    weakref.WeakSet()
)


@contextlib.contextmanager
def _moved(
    inner: Inner, momentum: float | None
) -> Iterator[tuple[keras.optimizers.Optimizer, error_feedback.ErrorFeedback]]:
    """Gives what applies the aggregate, and the rule of each replica.

    After an error the momentum is where it was.
    """
    if (
        isinstance(inner, keras.optimizers.Optimizer)
        and type(inner) in _ADAMS  # A subclass may take other steps.
        and not inner.amsgrad
        and momentum != 0
    ):
        if momentum is not None:
            validation.check_number(
                "momentum", momentum, "in [0, 1)", lambda m: 0 <= m < 1
            )
            raise ValueError(
                "`momentum` must be left out with Adam, which moves to the "
                "replicas with its own: give "
                f"`keras.optimizers.{type(inner).__name__}(..., "
                f"beta_1={momentum:g})`. Received: momentum={momentum:g}"
            )
        _check_not_built(inner)
        yield (
            keras_internals.sgd_like(inner),
            error_feedback.LocalAdam(
                error_feedback.LearnedShift(),
                inner.beta_1,
                inner.beta_2,
                dense_epsilon=inner.epsilon,
            ),
        )
        return
    with _momentum_moved(inner, momentum) as (optimizer, moved):
        yield (
            optimizer,
            error_feedback.LearnedShift(momentum=moved, at_once=True),
        )


@contextlib.contextmanager
def _momentum_moved(
    inner: Inner, momentum: float | None
) -> Iterator[tuple[keras.optimizers.Optimizer, float]]:
    """Gives what applies the aggregate, and the momentum of each replica."""
    if not isinstance(inner, keras.optimizers.Optimizer):
        yield _sgd(inner), 0.9 if momentum is None else momentum
        return
    if inner in _without_their_momentum:
        raise ValueError(
            "`inner` must be a new optimizer, because the momentum of this one "
            f"was moved to the replicas before. Received: inner={inner!r}"
        )
    of_inner = momentum_lib.momentum_of(inner)
    if momentum is not None:
        yield _inner_optimizer(inner, has_momentum=momentum > 0), momentum
        return
    # A subclass may do something else with its momentum.
    if type(inner) is not keras.optimizers.SGD:
        logger.warning(
            "`methods.recommended` moves SGD, Adam and AdamW (without "
            "`amsgrad`) to the replicas. %s acts after the sum, which costs "
            "accuracy at few bytes: compare it with one of these.",
            type(inner).__name__,
        )
        yield inner, 0.0
        return
    if not of_inner:
        yield inner, 0.0
        return
    if inner.nesterov:
        raise ValueError(
            "`inner` must not have `nesterov=True`, because that momentum "
            "cannot be moved to the replicas: give `keras.optimizers.SGD(0.1, "
            f"momentum={of_inner:g})`. Received: inner={inner!r}"
        )
    _check_not_built(inner)
    # The optimizer stays the user's own, because its configuration has neither
    # the variables that are excluded from weight decay nor any function.
    inner.momentum = 0.0
    try:
        yield inner, of_inner
    except BaseException:
        inner.momentum = of_inner
        raise
    _without_their_momentum.add(inner)


def _check_not_built(inner: keras.optimizers.Optimizer) -> None:
    if inner.built:
        raise ValueError(
            "`inner` must not be built, because its momentum is moved to the "
            f"replicas: give a new `keras.optimizers.{type(inner).__name__}`. "
            "Received: a built one"
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
        return _sgd(inner)
    momentum = momentum_lib.momentum_of(inner)
    if momentum and has_momentum:
        raise ValueError(
            "`inner` must have no momentum, because the method applies its own "
            "on each replica: give the learning rate, or an optimizer such as "
            "`keras.optimizers.RMSprop(0.001)`. Received: "
            f"{type(inner).__name__} with a momentum of {momentum:g}"
        )
    return inner


def _sgd(learning_rate: Any) -> keras.optimizers.SGD:
    if isinstance(learning_rate, (str, type)) or not (
        isinstance(learning_rate, SupportsFloat) or callable(learning_rate)
    ):
        raise TypeError(
            "`inner` must be a learning rate, a schedule or a Keras optimizer, "
            "such as `keras.optimizers.Adam(0.001)`. Received: "
            f"inner={learning_rate!r}"
        )
    return keras.optimizers.SGD(learning_rate)
