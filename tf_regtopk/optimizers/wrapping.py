"""Wrapping the optimizer of a compiled model, and unwrapping it, in place."""

from typing import Any
import warnings

import keras

from tf_regtopk import error_feedback
from tf_regtopk import keras_internals
from tf_regtopk import sparsifiers
from tf_regtopk.optimizers import decentralized
from tf_regtopk.optimizers import loss_scale
from tf_regtopk.optimizers import momentum
from tf_regtopk.optimizers import sparsified
from tf_regtopk.optimizers import wrapper


def wrap(
    model: keras.Model,
    sparsifier: sparsifiers.Sparsifier | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Wraps the optimizer of a compiled model in a `SparsifiedOptimizer`.

    A model that was trained without this library goes on with it: loss,
    metrics, weights, learning rate, step count and the variables of the
    optimizer stay as they are, and the residual errors start at zero. Around a
    `keras.optimizers.LossScaleOptimizer` comes the one of this package, with
    the scale of before.

    (`model.optimizer = SparsifiedOptimizer(model.optimizer)` trains as well,
    but Keras saves the optimizer that `compile` was given.)

    Args:
        model: The compiled `keras.Model`, which is changed.
        sparsifier: As of `SparsifiedOptimizer`.
        **kwargs: Further arguments of `SparsifiedOptimizer`.

    Returns:
        `model`.

    Raises:
        ValueError: If the model is not compiled, or its optimizer is wrapped
            already, or an argument breaks its rule.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.Adam(), loss="mse")  # Or is loaded.
    >>> model = wrap(model, sparsifiers.RegTopK(density=0.25))
    >>> type(model.optimizer).__name__, model.optimizer.density
    ('SparsifiedOptimizer', 0.25)
    """
    plain, scaler = _parts_of(model)
    if isinstance(plain, wrapper.OptimizerWrapper):
        raise ValueError(
            "The optimizer of `model` must not be wrapped yet: call "
            "`tf_regtopk.unwrap(model)` before. "
            f"Received: {model.optimizer!r}"
        )
    with keras_internals.strategy_of(plain).scope():
        optimizer = sparsified.SparsifiedOptimizer(plain, sparsifier, **kwargs)
        _replace(model, optimizer, scaler, loss_scale.LossScaleOptimizer, plain)
    return model


def unwrap(model: keras.Model) -> keras.Model:
    """Undoes `wrap`: the inner optimizer is the model's optimizer again.

    Training goes on with Keras alone. The residual errors, which are gradient
    that was not sent yet, are dropped, and so are batches that are accumulated
    since the last exchange. So is momentum on the replicas, such as that which
    `methods.recommended` moves there, and a warning says so.

    Args:
        model: The `keras.Model`, compiled with a `SparsifiedOptimizer`, or
            with a `DecentralizedOptimizer`, whose replicas are averaged. It is
            changed.

    Returns:
        `model`.

    Raises:
        ValueError: If the optimizer of the model is not wrapped.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(
    ...     sparsified.SparsifiedOptimizer(keras.optimizers.Adam()), loss="mse")
    >>> type(unwrap(model).optimizer).__name__
    'Adam'
    """
    optimizer, scaler = _parts_of(model)
    if not isinstance(optimizer, wrapper.OptimizerWrapper):
        raise ValueError(
            "The optimizer of `model` must be a `SparsifiedOptimizer`. "
            f"Received: {model.optimizer!r}"
        )
    if isinstance(optimizer, decentralized.DecentralizedOptimizer):
        optimizer.average_weights()  # All replicas are alike from here on.
    if isinstance(optimizer, sparsified.SparsifiedOptimizer):
        _warn_of_lost_momentum(optimizer)
    plain = optimizer.inner_optimizer
    with keras_internals.strategy_of(plain).scope():
        optimizer.release_inner_optimizer()
        _replace(
            model, plain, scaler, keras.optimizers.LossScaleOptimizer, plain
        )
    return model


def _warn_of_lost_momentum(optimizer: sparsified.SparsifiedOptimizer) -> None:
    """Warns if only the rule of error feedback has momentum."""
    inner = optimizer.inner_optimizer
    if optimizer.error_feedback.has_momentum and not momentum.momentum_of(
        inner
    ):
        rule = optimizer.error_feedback
        is_adam = isinstance(rule, error_feedback.LocalAdam)
        what, optimizer_like = (
            ("Adam", "Adam(learning_rate)")
            if is_adam
            else ("momentum", "SGD(learning_rate, momentum=0.9)")
        )
        warnings.warn(
            f"The {what} on the replicas ends with the wrapper, and the "
            f"{type(inner).__name__} of the model has none. To go on with "
            f"{what} compile the model anew, as with "
            f"`keras.optimizers.{optimizer_like}`. Received: "
            f"error_feedback={rule}",
            stacklevel=3,
        )


def _parts_of(
    model: keras.Model,
) -> tuple[
    keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer | None
]:
    """The optimizer of a model, and what scales the loss around it."""
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            f"`model` must be compiled with an optimizer. Received: {model!r}"
        )
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        return model.optimizer.inner_optimizer, model.optimizer
    return model.optimizer, None


def _replace(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    scaler: keras.optimizers.LossScaleOptimizer | None,
    scaler_class: type[keras.optimizers.LossScaleOptimizer],
    plain: keras.optimizers.Optimizer,
) -> None:
    """Makes an optimizer the model's, with a loss scale like the former one.

    Args:
        model: The model.
        optimizer: The optimizer.
        scaler: The former `LossScaleOptimizer`, if there is one.
        scaler_class: The class of the new one.
        plain: The inner optimizer, which may be built already.
    """
    if scaler is not None:
        optimizer = scaler_class(
            optimizer,
            initial_scale=scaler.initial_scale,
            dynamic_growth_steps=scaler.dynamic_growth_steps,
            name=scaler.name,
        )
    if plain.built:
        # For the same variables: layers may have been frozen since.
        optimizer.build(keras_internals.variables_of(plain))
        if scaler is not None and scaler.built:
            optimizer.step_counter.assign(scaler.step_counter)
            optimizer.dynamic_scale.assign(scaler.dynamic_scale)
    keras_internals.replace_optimizer(model, optimizer)
