"""Warm-up of the density under `model.fit`."""

from collections.abc import Iterable

from tf_regtopk import validation
from tf_regtopk.callbacks import density_of_epoch
from tf_regtopk.optimizers import wrapper


class DensityWarmup(density_of_epoch.DensityOfEpoch):
    """Sends more entries in the first epochs than later.

    Epoch i, counted from 0, trains with `densities[i]`, and the epochs after
    the last of these with the density of the optimizer's sparsifier. Whenever
    the density changes, the step is compiled anew, and what the sparsifier
    remembers of the last step is dropped. A run that is resumed goes on with
    the density of the epoch it resumes in.

    Args:
        densities: List of floats in (0, 1], one for each epoch.

    Raises:
        TypeError: If `densities` is no list of numbers.
        ValueError: If a density is not in (0, 1].

    Example:

    >>> warmup = DensityWarmup()
    >>> warmup.densities
    (0.25, 0.0625, 0.015625, 0.004)

    ```python
    model.fit(dataset, epochs=90, callbacks=[tf_regtopk.DensityWarmup()])
    ```

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression" (2018),
    whose densities are the defaults, before a last one of 0.001.
    """

    def __init__(
        self, densities: Iterable[float] = (0.25, 0.0625, 0.015625, 0.004)
    ) -> None:
        super().__init__()
        if not isinstance(densities, Iterable):
            raise TypeError(
                "`densities` must be a list of floats such as `[0.25, 0.01]`. "
                f"Received: densities={densities!r}"
            )
        self.densities = tuple(densities)
        for density in self.densities:
            validation.check_density("densities", density, "all in (0, 1]")

    def density_of(
        self, epoch: int, optimizer: wrapper.OptimizerWrapper
    ) -> float:
        if epoch < len(self.densities):
            return self.densities[epoch]
        return optimizer.default_density
