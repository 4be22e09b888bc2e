"""A density that follows the learning rate under `model.fit`."""

from collections.abc import Callable
from collections.abc import Iterable
import inspect
from typing import Any
from typing import TypeAlias

import keras

from tf_regtopk import keras_internals
from tf_regtopk import validation
from tf_regtopk.callbacks import density_of_epoch
from tf_regtopk.optimizers import wrapper
from tf_regtopk.sizes import density_decay

LearningRate: TypeAlias = (
    keras.optimizers.schedules.LearningRateSchedule | Callable[[int], float]
)


class DensityDecay(density_of_epoch.DensityOfEpoch):
    r"""Sends more entries while the learning rate is large, no more in all.

        d_t = d r_t^(2/3) / (mean over all epochs of r_t^(2/3))

    with the learning rates r_t and the density d of the optimizer's sparsifier,
    which is the mean over the training. An entry that waits in the residual
    error harms more while the learning rate is large, because the weights are
    off by the product of both. While a learning rate warms up its largest value
    counts, because the entries of these epochs are sent later.

    The epochs are in `num_phases` parts of one density each. Whenever the
    density changes, the step is compiled anew, and what the sparsifier
    remembers of the last step is dropped. After `fit` the last density stays,
    until `optimizer.set_density(d)`. A run that is resumed, with the same
    `epochs` of `fit`, goes on with the density of the epoch it resumes in.

    Args:
        learning_rate: A function of the epoch alone, counted from 0, that
            returns a float, as for `keras.callbacks.LearningRateScheduler`; or
            a `LearningRateSchedule`, of which step 0 is the beginning of epoch
            0 (a `fit` that goes on needs its `initial_epoch`). Only ratios
            matter. Defaults to the `LearningRateSchedule` of the optimizer.
        num_phases: Integer, the number of densities. With as many as epochs or
            more each epoch has its own.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `num_phases` is less than 1; in `fit`, if all learning
            rates are 0, if the optimizer has no schedule and none is given, or
            if the number of steps of an epoch is not known.

    Example:

    >>> decay = DensityDecay(lambda epoch: 0.1 * (1 - epoch / 4), num_phases=2)
    >>> decay.densities(0.01, num_epochs=4)
    [0.0128, 0.0128, 0.0072, 0.0072]

    ```python
    schedule = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=90_000)
    model.compile(
        optimizer=tf_regtopk.methods.recommended(
            keras.optimizers.SGD(schedule, momentum=0.9)),
        loss="sparse_categorical_crossentropy")
    model.fit(
        dataset, epochs=90, callbacks=[tf_regtopk.DensityDecay()])
    ```
    """

    def __init__(
        self, learning_rate: LearningRate | None = None, num_phases: int = 8
    ) -> None:
        super().__init__()
        if learning_rate is not None and not callable(learning_rate):
            raise TypeError(
                "`learning_rate` must be a `LearningRateSchedule`, or a "
                "function of the epoch that returns a float. Received: "
                f"learning_rate={learning_rate!r}"
            )
        if learning_rate is not None and not _is_schedule(learning_rate):
            _check_function_of_epoch(learning_rate)
        validation.check_integer("num_phases", num_phases, 1)
        self.learning_rate = learning_rate
        self.num_phases = num_phases
        # What `densities` has returned, because a schedule takes its time, and
        # of which learning rate.
        self._found: dict[tuple[float, int, float], list[float]] = {}
        self._found_of: LearningRate | None = None

    def densities(
        self, density: float, num_epochs: int, steps_per_epoch: float = 0.0
    ) -> list[float]:
        """Returns the density of each epoch.

        Args:
            density: Float d in (0, 1].
            num_epochs: Number of epochs of the whole training.
            steps_per_epoch: Number of steps of an epoch, as `iterations` counts
                them. A function of the epoch needs none.

        Raises:
            ValueError: If there is no learning rate yet: without
                `learning_rate` the callback knows it in `fit` only.
        """
        if self.learning_rate is None:
            raise ValueError(
                "`learning_rate` must be given to know the densities before "
                "`fit`. Received: learning_rate=None"
            )
        return self._densities(
            self.learning_rate, density, num_epochs, steps_per_epoch
        )

    def density_of(
        self, epoch: int, optimizer: wrapper.OptimizerWrapper
    ) -> float:
        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = _schedule_of(optimizer)
        num_batches = self.params["steps"]
        if not num_batches and _is_schedule(learning_rate):
            raise ValueError(
                "`steps_per_epoch` of `fit` must be given for `DensityDecay`, "
                "because the dataset does not tell how many batches it has. "
                f"Received: steps={num_batches}"
            )
        if learning_rate is not self._found_of:
            self._found, self._found_of = {}, learning_rate
        arguments = (
            optimizer.default_density,
            self.params["epochs"],
            (num_batches or 0) / optimizer.accumulation_steps,
        )
        if arguments not in self._found:
            self._found[arguments] = self._densities(learning_rate, *arguments)
        return self._found[arguments][epoch]

    def _densities(
        self,
        learning_rate: LearningRate,
        density: float,
        num_epochs: int,
        steps_per_epoch: float,
    ) -> list[float]:
        times: Iterable[Any] = range(num_epochs)
        if _is_schedule(learning_rate):  # The middle of each epoch, in steps.
            times = [(epoch + 0.5) * steps_per_epoch for epoch in times]
        rates = [float(learning_rate(time)) for time in times]
        return density_decay.densities(rates, density, self.num_phases)


def _is_schedule(learning_rate: LearningRate) -> bool:
    return isinstance(
        learning_rate, keras.optimizers.schedules.LearningRateSchedule
    )


def _check_function_of_epoch(function: Callable[..., float]) -> None:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        raise TypeError(
            "`learning_rate` must be a function of the epoch alone, because "
            "the densities of all epochs are known before the first: `lambda "
            "epoch: 0.1 / (1 + epoch)`. Received: a function with the "
            f"arguments {inspect.signature(function)}"
        ) from None
    except ValueError:
        pass  # Functions in C may say nothing of their arguments.


def _schedule_of(optimizer: wrapper.OptimizerWrapper) -> LearningRate:
    schedule = keras_internals.learning_rate_schedule(optimizer.inner_optimizer)
    if schedule is None:
        raise ValueError(
            "`learning_rate` of `DensityDecay` must be given where the "
            "optimizer has no `LearningRateSchedule`: a function of the epoch, "
            "as for `keras.callbacks.LearningRateScheduler`. Received: "
            "learning_rate=None, and the inner optimizer "
            f"{type(optimizer.inner_optimizer).__name__}"
        )
    return schedule
