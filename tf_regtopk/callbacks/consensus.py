"""The mean of decentralised replicas: to save, to evaluate, to watch."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from typing import Any

import keras
import tensorflow as tf

from tf_regtopk.callbacks import of_models
from tf_regtopk.optimizers import averaging
from tf_regtopk.optimizers import decentralized


@contextlib.contextmanager
def averaged(
    model: keras.Model,
    optimizer: decentralized.DecentralizedOptimizer | None = None,
) -> Iterator[None]:
    """Gives all replicas of a model the mean of their weights, for a while.

    For `DecentralizedOptimizer`, whose replicas have weights of their own. In
    the `with` statement the model that Keras saves, evaluates or exports is the
    mean; afterwards each replica goes on with what it had. All weights of
    floats are averaged, also the moving statistics of BatchNormalization (which
    are no statistics of the mean model). Several workers have to enter at the
    same time.

    Args:
        model: `keras.Model`, compiled with a `DecentralizedOptimizer`.
        optimizer: The `DecentralizedOptimizer` of a model that is not compiled,
            as in a custom loop.

    Raises:
        ValueError: If the model has another optimizer.

    Example:

    ```python
    with tf_regtopk.averaged(model):
        model.save("average.keras")
    ```
    """
    strategy = model.distribute_strategy
    optimizers = _all_decentralized(model, optimizer)
    if strategy.num_replicas_in_sync == 1:
        yield
        return
    variables = [v for v in model.weights if _is_float(v)]
    with _weights_kept(variables, optimizers, strategy):
        averaging.average(variables, strategy)
        for each in optimizers:
            each.note_agreement(True)
        yield


@contextlib.contextmanager
def tracked(
    model: keras.Model,
    optimizer: decentralized.DecentralizedOptimizer | None = None,
) -> Iterator[None]:
    """Gives each replica what it has tracked of the mean, for a while.

    For `DecentralizedOptimizer` with `mixing_rule=AverageTracker()`. As
    `averaged`, but nothing is sent: each replica has its own estimate of the
    mean of the trainable weights, and keeps its other weights.

    Args:
        model: `keras.Model`, compiled with a `DecentralizedOptimizer`.
        optimizer: The `DecentralizedOptimizer` of a model that is not compiled,
            as in a custom loop.

    Raises:
        ValueError: If the model has another optimizer, or it another rule.

    Example:

    ```python
    with tf_regtopk.tracked(model):
        model.evaluate(dataset)
    ```
    """
    strategy = model.distribute_strategy
    optimizers = _all_decentralized(model, optimizer)
    with _weights_kept(model.trainable_variables, optimizers, strategy):
        for each in optimizers:
            each.use_tracked_average()
        yield


class ConsensusDistance(keras.callbacks.Callback):
    """Puts the distance of decentralised replicas to their mean into the logs.

    After each epoch, as `consensus_distance`: the root of the mean over the
    replicas of |x_i - mean|^2. Costs an all-reduce of all weights.

    Raises:
        ValueError: When `fit` begins, if the model has another optimizer than a
            `DecentralizedOptimizer`.

    Example:

    ```python
    model.fit(dataset, callbacks=[tf_regtopk.ConsensusDistance()])
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._distance: Callable[[], float] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        decentralized_of(self.model)
        self._distance = averaging.distance_function(
            self.model.trainable_variables, self.model.distribute_strategy
        )

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        assert self._distance is not None
        distance = self._distance()
        if logs is not None:
            logs["consensus_distance"] = distance


class EvaluateAverage(keras.callbacks.Callback):
    """Evaluates the mean of decentralised replicas after each epoch.

    In place of `validation_data`, by which each replica's own model is
    evaluated on a part of each batch. The results are in the logs with
    `average_` before their names.

    Args:
        x: Data for `keras.Model.evaluate`.
        y: Targets, if `x` does not have them.
        **kwargs: Further arguments of `keras.Model.evaluate`.

    Example:

    ```python
    model.fit(dataset, callbacks=[tf_regtopk.EvaluateAverage(test_dataset)])
    ```
    """

    def __init__(self, x: Any, y: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self._arguments = {"verbose": 0, **kwargs, "x": x, "y": y}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        decentralized_of(self.model)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        with averaged(self.model):
            results = self.model.evaluate(**self._arguments, return_dict=True)
        if logs is not None:
            logs.update({f"average_{n}": value for n, value in results.items()})


@contextlib.contextmanager
def _weights_kept(
    variables: Sequence[keras.Variable],
    optimizers: Sequence[decentralized.DecentralizedOptimizer],
    strategy: tf.distribute.Strategy,
) -> Iterator[None]:
    """Gives back at the end what each replica had."""
    did_agree = [each.replicas_agree for each in optimizers]
    try:
        with averaging.weights_kept(variables, strategy):
            yield
    finally:
        for each, agreed in zip(optimizers, did_agree, strict=True):
            each.note_agreement(agreed)


def _all_decentralized(
    model: keras.Model,
    optimizer: decentralized.DecentralizedOptimizer | None,
) -> list[decentralized.DecentralizedOptimizer]:
    """The optimizer given or compiled, and others that are attributes."""
    optimizers = [optimizer or decentralized_of(model)]
    return optimizers + [
        other
        for other in of_models.optimizers_of(model)
        if isinstance(other, decentralized.DecentralizedOptimizer)
        and other not in optimizers
    ]


def decentralized_of(
    model: keras.Model,
) -> decentralized.DecentralizedOptimizer:
    """Returns the optimizer of a model, or raises.

    Args:
        model: `keras.Model`.
    """
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if not isinstance(optimizer, decentralized.DecentralizedOptimizer):
        raise ValueError(
            "`model` must be compiled with a `DecentralizedOptimizer`, because "
            "with others all replicas have the same weights. Received: "
            f"{optimizer!r}"
        )
    return optimizer


def _is_float(variable: keras.Variable) -> bool:
    return keras.backend.is_float_dtype(variable.dtype)
