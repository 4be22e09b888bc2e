"""A communication period that follows what differing data costs."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.callbacks import consensus
from tf_regtopk.callbacks import travelling
from tf_regtopk.distribute import collectives
from tf_regtopk.optimizers import averaging

# Accuracies are compared by all workers as multiples of this.
_UNIT = 1e-6


class HillClimb:
    """Looks for the period of least cost by trying those beside the best one.

    Args:
        periods: Tuple of rising integers.

    Example:

    >>> climb, period = HillClimb((1, 2, 4, 8)), 1
    >>> for _ in range(6):
    ...     period = climb.next(period, cost=abs(period - 4))
    >>> period
    4
    """

    def __init__(self, periods: Sequence[int]) -> None:
        self._periods = tuple(periods)
        self._costs: dict[int, float] = {}

    def next(self, period: int, cost: float) -> int:
        """Returns the period to go on with.

        Args:
            period: That of until now.
            cost: Its cost, which is taken in place of an earlier one.
        """
        self._costs[period] = cost
        # Of periods of one cost the longest, which sends least.
        best = min(self._costs, key=lambda p: (self._costs[p], -p))
        place = self._periods.index(best)
        beside = self._periods[max(place - 1, 0) : place + 2]
        untried = [p for p in beside if p not in self._costs]
        return max(untried, default=best)


class SkewScout(keras.callbacks.Callback):
    r"""Lets replicas exchange as rarely as the skew of their data allows.

    For `DecentralizedOptimizer`, whose `communication_period` p it sets. After
    an epoch models travel: each replica's data is also given to the weights of
    another replica, and

        AL   = accuracy of the replicas' own models on their data
               - accuracy of travelling models on the same data
        J(p) = loss_weight max(0, AL - tolerance) + 1 / p

    AL is what is lost where the data of replicas differs and they have gone
    apart, and 1 / p are the bytes. Hill climbing looks for the period of the
    least J(p): it tries the periods beside the best one so far, and stays where
    these are worse. Each measurement replaces an earlier one of its period.

    Replicas with the same weights, as after a mean of all, lose nothing by
    travelling, which says nothing of the period: there is no measurement then.

    The logs get `accuracy_loss` and `communication_period`. A resumed run has
    the period, where the optimizer's variables were saved, and measures anew.

    Args:
        x: Data for `keras.Model.evaluate`, of which each replica gets a part of
            each batch. It must be split as the training data is: a replica's
            part is to be like what it is trained on.
        y: Targets, if `x` does not have them.
        periods: List of rising integers, among them the `communication_period`
            of the optimizer.
        metric: String, the name in the logs of a metric of the model that is
            larger for better models, such as an accuracy.
        tolerance: Float in [0, 1), the loss of accuracy that costs nothing.
        loss_weight: Positive float. At 50 an accuracy that is 2 points beyond
            the tolerance costs what an exchange in every step costs.
        every: Integer, of how many epochs the last one ends with a measurement.
        **kwargs: Further arguments of `keras.Model.evaluate`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule; when `fit` begins, if the
            model has another optimizer than a `DecentralizedOptimizer`, a
            single replica, or a period that is not among `periods`; after an
            epoch, if the metric is not among the results.

    Example:

    ```python
    scout = tf_regtopk.SkewScout(sample, periods=[1, 2, 4, 8], batch_size=80)
    model.fit(dataset, epochs=50, callbacks=[scout])
    ```

    Source: Hsieh, Phanishayee, Mutlu, Gibbons, "The Non-IID Data Quagmire of
    Decentralized Machine Learning" (2020).
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        periods: Sequence[int] = (1, 2, 4, 8, 16),
        metric: str = "accuracy",
        tolerance: float = 0.05,
        loss_weight: float = 50.0,
        every: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _check_periods(periods)
        if not isinstance(metric, str) or metric == "loss":
            raise ValueError(
                "`metric` must be the name of a metric that is larger for "
                'better models, such as "accuracy". Received: '
                f"metric={metric!r}"
            )
        validation.check_number(
            "tolerance", tolerance, "in [0, 1)", lambda value: 0 <= value < 1
        )
        validation.check_number(
            "loss_weight", loss_weight, "positive", lambda value: value > 0
        )
        validation.check_integer("every", every, 1)
        self.periods = tuple(map(int, periods))
        self.metric = metric
        self.tolerance = float(tolerance)
        self.loss_weight = float(loss_weight)
        self.every = int(every)
        self._arguments = {"verbose": 0, **kwargs, "x": x, "y": y}
        self._climb = HillClimb(self.periods)
        self._travel: travelling.Travel | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = consensus.decentralized_of(self.model)
        strategy = self.model.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            raise ValueError(
                "`SkewScout` must have several replicas, between which models "
                "travel. Received: 1"
            )
        if optimizer.communication_period not in self.periods:
            raise ValueError(
                "`periods` must hold the `communication_period` of the "
                f"optimizer, {optimizer.communication_period}. Received: "
                f"periods={self.periods}"
            )
        self._climb, self._travel = HillClimb(self.periods), None

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        optimizer = consensus.decentralized_of(self.model)
        is_due = (epoch + 1) % self.every == 0
        found: dict[str, Any] = {}
        if is_due and not averaging.are_alike(
            self.model.trainable_variables, self.model.distribute_strategy
        ):
            loss = self.accuracy_loss()
            found["accuracy_loss"] = loss
            period = optimizer.communication_period
            following = self._climb.next(period, self.cost(period, loss))
            if following != period:
                optimizer.communication_period = following
        found["communication_period"] = optimizer.communication_period
        if logs is not None:
            logs.update(found)

    def cost(self, period: int, accuracy_loss: float) -> float:
        """Returns J(p).

        Args:
            period: p.
            accuracy_loss: AL.
        """
        beyond = max(0.0, accuracy_loss - self.tolerance)
        return self.loss_weight * beyond + 1 / period

    def accuracy_loss(self) -> float:
        """Returns AL, which all workers have to ask for at the same time."""
        strategy = self.model.distribute_strategy
        if self._travel is None:
            weights = [
                weight
                for weight in self.model.weights
                if keras.backend.is_float_dtype(weight.dtype)
            ]
            self._travel = travelling.Travel(weights, strategy)
        own = self._accuracy()
        with self._travel.away():
            elsewhere = self._accuracy()
        return _of_first_worker(own - elsewhere, strategy)

    def _accuracy(self) -> float:
        results = self.model.evaluate(**self._arguments, return_dict=True)
        if self.metric not in results:
            raise ValueError(
                "`metric` must be among what `evaluate` returns, "
                f"{[*results]}. Received: metric={self.metric!r}"
            )
        return float(results[self.metric])


def _of_first_worker(value: float, strategy: tf.distribute.Strategy) -> float:
    """A number that is the same on all workers, which are to decide alike."""
    if averaging.are_local(strategy):
        return value
    rounded = round(value / _UNIT)
    numbers = collectives.gather_from_workers([rounded], strategy)
    return int(numbers[0, 0]) * _UNIT


def _check_periods(periods: Any) -> None:
    """Raises unless there are several periods, each longer than the last."""
    message = (
        "`periods` must be a list of at least two rising integers >= 1 such as "
        f"`[1, 2, 4, 8]`. Received: periods={periods!r}"
    )
    if not isinstance(periods, Sequence) or isinstance(periods, str):
        raise TypeError(message)
    for period in periods:
        validation.check_integer("periods", period, 1)
    if len(periods) < 2 or sorted({*periods}) != [*periods]:
        raise ValueError(message)
