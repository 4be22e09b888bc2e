"""Densities that follow the learning rate, at the same entries in all."""

from collections.abc import Sequence

import numpy as np

from tf_regtopk import validation

POWER = 2 / 3


def densities(
    learning_rates: Sequence[float], density: float, num_phases: int = 8
) -> list[float]:
    r"""The densities of parts of a training, of which the mean is given.

        d_t = d r_t^(2/3) / (mean over all t of r_t^(2/3))

    with the learning rates r_t. In a step the weights are off by what the
    residual errors hold back. The square of that grows as r_t^2 / d_t^2,
    because an entry waits for 1 / d_t steps. Its sum over the steps is the
    least, for a given sum of d_t, with these d_t. Before the largest rate, as
    while a learning rate warms up, the largest one counts, because entries of
    these steps are sent later.

    Args:
        learning_rates: T non-negative floats, such as one for each epoch.
        density: Float d in (0, 1].
        num_phases: Integer, the number of parts of the training, each of which
            has the mean of its densities. With T or more each t has its own.

    Returns:
        List of T floats in (0, 1]. None is less than a hundredth of d, because
        a training may end with a learning rate of 0; if one would be more than
        1 it is 1, and the mean is less than d.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> densities([1.0, 0.6, 0.2, 0.0], 0.01, num_phases=2)
    [0.01667, 0.01667, 0.003331, 0.003331]
    """
    validation.check_density("density", density)
    validation.check_integer("num_phases", num_phases, 1)
    for rate in learning_rates:
        validation.check_number(
            "learning_rates", rate, "all non-negative", lambda r: r >= 0
        )
    weights = np.array(learning_rates, np.float64) ** POWER
    weights[: weights.argmax()] = weights.max()
    if not weights.any():
        raise ValueError(
            "`learning_rates` must not all be 0. Received: "
            f"learning_rates={list(learning_rates)}"
        )
    for part in np.array_split(weights, min(num_phases, len(weights))):
        part[:] = part.mean()
    of_mean = np.maximum(weights / weights.mean(), 0.01)
    found = np.minimum(density * of_mean, 1.0)
    return [float(f"{d:.4g}") for d in found]
