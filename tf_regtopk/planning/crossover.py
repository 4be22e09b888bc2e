"""The most workers and the density up to which a method beats dense."""

from collections.abc import Callable
import dataclasses

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import network as network_lib

MAX_WORKERS = 2**20


def fastest_dense(job: cost_model.Job, network: network_lib.Network) -> float:
    """Returns the least `step_seconds` of the methods that are dense."""
    return min(
        method.cost(job, network).step_seconds
        for method in cost_model.methods(job)
        if method.is_dense
    )


def last_workers(
    method: cost_model.Method, job: cost_model.Job, network: network_lib.Network
) -> int:
    """Finds the most workers with which a method is faster than dense.

    Args:
        method: `cost_model.Method`.
        job: `cost_model.Job`, of which `workers` does not matter.
        network: `network.Network`.

    Returns:
        Integer: 0 if the method is never faster, `MAX_WORKERS` if there is no
        end before.
    """

    def wins(num_workers: int) -> bool:
        trial = dataclasses.replace(job, workers=num_workers)
        return _wins(method, trial, network)

    return _last(wins, 2, MAX_WORKERS)


def last_density(
    method: cost_model.Method, job: cost_model.Job, network: network_lib.Network
) -> float:
    """Finds the density up to which a method is faster than dense.

    Args:
        method: `cost_model.Method`.
        job: `cost_model.Job`, of which `density` does not matter.
        network: `network.Network`.

    Returns:
        A multiple of 1 / J below 1: 0.0 if the method is never faster,
        (J - 1) / J if there is no end. With all J entries no index is sent,
        which is another method.
    """

    def wins(k: int) -> bool:
        trial = dataclasses.replace(job, density=k / job.parameters)
        return _wins(method, trial, network)

    return _last(wins, 1, max(1, job.parameters - 1)) / job.parameters


def _wins(
    method: cost_model.Method, job: cost_model.Job, network: network_lib.Network
) -> bool:
    step_seconds = method.cost(job, network).step_seconds
    return step_seconds < fastest_dense(job, network)


def _last(wins: Callable[[int], bool], first: int, last: int) -> int:
    """Finds the largest number that wins, 0 if none does.

    A method may lose with few workers, win, and lose again: so a geometric grid
    is tried, and the interval behind its last success is bisected.
    """
    grid = []
    while first < last:
        grid.append(first)
        first += max(1, first // 8)
    grid.append(last)
    won = [i for i, number in enumerate(grid) if wins(number)]
    if not won:
        return 0
    low, high = grid[won[-1]], grid[min(won[-1] + 1, len(grid) - 1)]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low
