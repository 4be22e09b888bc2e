"""A density of each epoch under `model.fit`."""

import abc
from typing import Any

import keras

from tf_regtopk.callbacks import of_models
from tf_regtopk.optimizers import wrapper


class DensityOfEpoch(keras.callbacks.Callback, abc.ABC):
    """Base class of callbacks that choose the density of each epoch.

    Whenever the density changes, the step is compiled anew, and what the
    sparsifier remembers of the last step is dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        # The training function, and the number of changes when it was traced.
        self._traced: tuple[Any, list[int]] | None = None

    @abc.abstractmethod
    def density_of(
        self, epoch: int, optimizer: wrapper.OptimizerWrapper
    ) -> float:
        """Returns the density of an epoch.

        Args:
            epoch: Integer, counted from 0.
            optimizer: `SparsifiedOptimizer`, one of the model's.
        """

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        optimizers = of_models.all_of_model(self.model, has_gradients=True)
        for optimizer in optimizers:
            density = self.density_of(epoch, optimizer)
            if density != optimizer.density:
                optimizer.set_density(density)
        # The function that `fit` holds may have been traced before a change.
        changes = [optimizer.changes for optimizer in optimizers]
        traced = self.model.train_function, changes
        if traced != self._traced:
            self.model.make_train_function(force=True)
            self._traced = self.model.train_function, changes
