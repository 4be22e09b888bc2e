"""The wrappers among the optimizers of a `keras.Model`."""

import keras

from tf_regtopk.optimizers import wrapper


def of_model(
    model: keras.Model, has_gradients: bool = False
) -> wrapper.OptimizerWrapper:
    """The wrapper in the optimizer of a `keras.Model`, which it builds.

    Args:
        model: `keras.Model`.
        has_gradients: Whether it must be one that exchanges gradients.
    """
    optimizer = _wrapper_in(model.optimizer)
    if optimizer is None or (
        has_gradients and not optimizer.exchanges_gradients
    ):
        raise _no_wrapper(model.optimizer)
    if not model.built:
        raise ValueError(
            "`model` must be built, as by `model.build(input_shape)`. "
            f"Received: {model!r}"
        )
    if not optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return optimizer


def all_of_model(
    model: keras.Model, has_gradients: bool = False
) -> list[wrapper.OptimizerWrapper]:
    """The wrappers in all optimizers of a `keras.Model`.

    A model with a `train_step` of its own may keep several optimizers as its
    attributes, as a GAN does. Only that of `compile` can be built here.

    Args:
        model: `keras.Model`.
        has_gradients: Whether only those count that exchange gradients.
    """
    optimizers = optimizers_of(model)
    wrappers = [
        w
        for w in map(_wrapper_in, optimizers)
        if w is not None and (w.exchanges_gradients or not has_gradients)
    ]
    if not wrappers:
        raise _no_wrapper(model.optimizer)
    if _wrapper_in(model.optimizer):
        of_model(model)
    if not all(optimizer.built for optimizer in wrappers):
        raise ValueError(
            "All optimizers of `model` must be built, as by "
            "`model.g_optimizer.build(model.generator.trainable_variables)`. "
            f"Received: {model!r}"
        )
    return wrappers


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The optimizer of `compile`, and all others that are attributes."""
    candidates = [getattr(model, "optimizer", None)]
    for value in vars(model).values():
        if isinstance(value, dict):
            candidates.extend(value.values())
        elif isinstance(value, (list, tuple)):
            candidates.extend(value)
        else:
            candidates.append(value)
    optimizers = {
        id(candidate): candidate
        for candidate in candidates
        if isinstance(candidate, keras.optimizers.Optimizer)
    }
    return list(optimizers.values())


def _wrapper_in(
    optimizer: keras.optimizers.Optimizer | None,
) -> wrapper.OptimizerWrapper | None:
    """The wrapper that an optimizer is, or has somewhere inside, or None."""
    while optimizer is not None and not isinstance(
        optimizer, wrapper.OptimizerWrapper
    ):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def _no_wrapper(optimizer: keras.optimizers.Optimizer | None) -> ValueError:
    if _wrapper_in(optimizer) is not None:
        return ValueError(
            "The optimizer of `model` must be a `SparsifiedOptimizer`, because "
            "this is about the exchange of gradients, and others exchange "
            f"weights. Received: {optimizer!r}"
        )
    return ValueError(
        "The optimizer of `model` must be a `SparsifiedOptimizer`: wrap it "
        f"before, as by `tf_regtopk.wrap(model)`. Received: {optimizer!r}"
    )
