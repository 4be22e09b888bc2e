"""The limits up to which a method beats dense, and an answer stays the same."""

from collections.abc import Callable
import dataclasses
import math
from typing import TypeVar

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib

MAX_WORKERS = 2**20
# So many values of a decade are tried in the search for another answer.
_TRIED_PER_DECADE = 12

T = TypeVar("T")


def with_members(job: job_lib.Job, number: int) -> job_lib.Job:
    """Returns the job with other workers, or devices of its only worker."""
    if job.workers == 1:
        return dataclasses.replace(job, devices_per_worker=number)
    return dataclasses.replace(job, workers=number)


def fastest_dense(job: job_lib.Job, network: network_lib.Network) -> float:
    """Returns the least `step_seconds` of the methods that are dense."""
    return min(
        method.cost(job, network).step_seconds
        for method in cost_model.methods(job)
        if method.is_dense
    )


def last_workers(
    method: cost_model.Method, job: job_lib.Job, network: network_lib.Network
) -> int:
    """Finds the most workers with which a method is faster than dense.

    Args:
        method: `cost_model.Method`.
        job: `job_lib.Job`, of which `workers` does not matter. Of a job
            with one worker the devices count.
        network: `network.Network`.

    Returns:
        Integer: 0 if the method is never faster, `MAX_WORKERS` if there is no
        end before.
    """

    def wins(num_workers: int) -> bool:
        return _wins(method, with_members(job, num_workers), network)

    return _last(wins, 2, MAX_WORKERS)


def last_density(
    method: cost_model.Method, job: job_lib.Job, network: network_lib.Network
) -> float:
    """Finds the density up to which a method is faster than dense.

    Args:
        method: `cost_model.Method`.
        job: `job_lib.Job`, of which `density` does not matter.
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


def nearest_changes(
    answer: Callable[[float], T], value: float, low: float, high: float
) -> tuple[tuple[float, T] | None, tuple[float, T] | None]:
    """Finds the nearest values at which a function answers differently.

    Args:
        answer: Function of a number.
        value: Positive number, from which the search starts.
        low: Smallest number of the search.
        high: Largest number of the search.

    Returns:
        Two pairs, below and above `value`, of the number from which on the
        answer is another (within 0.1 %) and that answer; None if there is none.

    Example:

    >>> below, above = nearest_changes(lambda x: x > 3, 1.0, 0.1, 10.0)
    >>> below is None, round(above[0], 2), above[1]
    (True, 3.0, True)
    """
    return (
        _nearest_change(answer, value, low),
        _nearest_change(answer, value, high),
    )


def _nearest_change(
    answer: Callable[[float], T], value: float, end: float
) -> tuple[float, T] | None:
    decades = math.log10(end / value)
    num_tried = math.ceil(abs(decades) * _TRIED_PER_DECADE)
    first, near = answer(value), value
    for i in range(1, num_tried + 1):
        far = value * 10 ** (decades * i / num_tried)
        if answer(far) != first:
            break
        near = far
    else:
        return None
    while abs(math.log(far / near)) > 1e-3:
        middle = math.sqrt(near * far)
        if answer(middle) == first:
            near = middle
        else:
            far = middle
    return far, answer(far)


def _wins(
    method: cost_model.Method, job: job_lib.Job, network: network_lib.Network
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
