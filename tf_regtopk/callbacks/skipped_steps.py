"""Steps of an epoch that a resumed run skips, as they were taken before."""

from collections.abc import Iterator
import itertools
from typing import Any

import keras
import tensorflow as tf

from tf_regtopk.callbacks import backup_contents
from tf_regtopk.log import logger

_NO_METRICS = "The logs of this epoch cover only its steps from here on: %s"


class SkippedSteps:
    """Skips the first steps of an epoch: reads their batches, and drops these.

    `fit` reads the attribute `train_function` of the model at each execution of
    `steps_per_execution` steps. So another function stands in for it there, for
    one execution at a time.

    Args:
        model: `keras.Model` that was restored.
        epoch: `EpochState` of the backup.
        num_steps: The number of steps of the whole epoch now, 0 if unknown.
    """

    def __init__(
        self,
        model: keras.Model,
        epoch: backup_contents.EpochState,
        num_steps: int,
    ) -> None:
        self._model, self._epoch = model, epoch
        self.num_executions = _num_executions(
            epoch, num_steps, model.steps_per_execution
        )
        _tell(epoch, num_steps, self.num_executions * model.steps_per_execution)

    def skip(self, number: int) -> None:
        """Lets `fit` skip the execution that it is about to call.

        Args:
            number: The number of the execution in the epoch, from 0 on.
        """
        model, function = self._model, self._model.train_function

        def read(iterator: Iterator[Any]) -> dict[str, Any]:
            model.train_function = function
            batch = _last_of(iterator, model.steps_per_execution)
            if batch is None:
                raise ValueError(
                    "The data set must give the batches of this epoch's "
                    f"{self._epoch.step} steps that were taken before. "
                    f"Received: about {number * model.steps_per_execution} "
                    "batches. With other batches than before, give "
                    "`steps_per_epoch`: then the same share is skipped"
                )
            if number + 1 < self.num_executions:
                return {}
            return _put_metrics_back(model, self._epoch, batch)

        model.train_function = read


def _num_executions(
    epoch: backup_contents.EpochState, num_steps: int, steps_per_execution: int
) -> int:
    """Number of executions that are the same share of an epoch as was trained.

    Example:

    >>> epoch = backup_contents.EpochState(60, 90, 1, [])
    >>> _num_executions(epoch, 90, 5), _num_executions(epoch, 30, 5)
    (12, 4)
    """
    step: float = epoch.step
    if epoch.num_steps and num_steps:
        step *= num_steps / epoch.num_steps
    executions = round(step / steps_per_execution)
    if not num_steps:
        return executions
    # One is left, so that the epoch has logs.
    return min(executions, (num_steps - 1) // steps_per_execution)


def _tell(
    epoch: backup_contents.EpochState, num_steps: int, num_skipped: int
) -> None:
    logger.info(
        "Skipping the first %d steps of the epoch: their batches are read and "
        "dropped",
        num_skipped,
    )
    if num_skipped != epoch.step:
        logger.warning(
            "Skipping %d of %s steps, about the same share of the epoch as the "
            "%d of %s that were taken",
            num_skipped,
            num_steps or "an unknown number of",
            epoch.step,
            epoch.num_steps or "an unknown number of",
        )
    if not num_skipped:
        logger.info(_NO_METRICS, "no step is skipped")


def _last_of(iterator: Iterator[Any], count: int) -> Any:
    """Reads so many batches, or those left; returns the last, None if none."""
    batch = None
    for following in itertools.islice(iterator, count):
        batch = following
    return batch


def _put_metrics_back(
    model: keras.Model, epoch: backup_contents.EpochState, batch: Any
) -> dict[str, Any]:
    """Lets the metrics go on from their state, and returns their results."""
    num_replicas = model.distribute_strategy.num_replicas_in_sync
    if num_replicas != epoch.num_replicas:
        logger.info(
            _NO_METRICS,
            f"{epoch.num_replicas} replicas had begun it, and "
            f"{num_replicas} go on",
        )
        return {}
    if len(model.metrics_variables) < len(epoch.metrics):
        try:
            _build_metrics(model, batch)
        except Exception as error:  # Code of the user's.
            logger.info(_NO_METRICS, f"{type(error).__name__}: {error}")
            return {}
    variables = backup_contents.metrics_variables(model)
    shapes = [[v.shape for v in of_one] for of_one in variables]
    if shapes != [[a.shape for a in of_one] for of_one in epoch.metrics]:
        logger.info(_NO_METRICS, "the model had other metrics")
        return {}
    for of_one, arrays in zip(variables, epoch.metrics, strict=True):
        for variable, array in zip(of_one, arrays, strict=True):
            variable.assign(array)
    return model.get_metrics_result()


def _build_metrics(model: keras.Model, batch: Any) -> None:
    """Makes the variables of the metrics, as the first step does.

    Under a strategy `fit` has made them before. A step is traced here, and not
    taken, which changes no weights and draws no random numbers.
    """
    # Keras passes None for what a batch lacks.
    batch = keras.tree.map_structure(
        lambda leaf: (
            None if isinstance(leaf, tf.experimental.Optional) else leaf
        ),
        batch,
    )
    step = tf.function(model.train_step, autograph=False)
    step.get_concrete_function(batch)
