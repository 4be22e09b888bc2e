"""Groups of replicas whose data, taken together, is like the data of all.

For `Cliques` of `DecentralizedOptimizer`, where the data of the replicas
differs: `greedy_cliques` by the labels of the data, `clump` by any numbers that
describe it. Everything is computed before training, by NumPy.
"""

from collections.abc import Callable
from collections.abc import Sequence
import operator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tf_regtopk import validation

# What is to be small, of the sums `[..., d]` over groups of so many replicas.
_Loss: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
_HISTOGRAMS = (
    "an array [replicas, labels] of numbers of samples, with some of each "
    "replica"
)
_PROXIES = "an array [replicas, length] of finite numbers"


def greedy_cliques(
    histograms: npt.ArrayLike,
    clique_size: int,
    *,
    num_steps: int = 1000,
    seed: int = 0,
) -> list[list[int]]:
    """Chooses cliques of replicas by what labels their data has.

    The cliques are random at first. In each step two of them, chosen at random,
    exchange the two members by which the sum of their skews falls most, if any
    exchange lets the sum fall. The skew of a clique is the sum over the labels
    of |share in the clique - share in all data|.

    Args:
        histograms: Array `[N, number of labels]`, how many samples of each
            label each replica has.
        clique_size: Integer. The last clique is smaller if N is no multiple.
        num_steps: Integer, the number of steps.
        seed: Integer, of the random numbers.

    Returns:
        List of cliques, lists of ranks, in rising order.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If an argument breaks its rule.

    Example:

    >>> one_label_each = [[9, 0], [9, 0], [0, 9], [0, 9]]
    >>> cliques = greedy_cliques(one_label_each, clique_size=2)
    >>> [skew(one_label_each, clique) for clique in cliques]
    [0.0, 0.0]

    Source: Bellet, Kermarrec, Lavoie, "D-Cliques" (2021), with the best
    exchange in place of a random one.
    """
    counts = _counts(histograms)
    validation.check_integer("clique_size", clique_size, 1)
    validation.check_integer("num_steps", num_steps, 0)
    validation.check_integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts)).tolist()
    cliques = [
        order[start : start + clique_size]
        for start in range(0, len(order), clique_size)
    ]
    return _exchange_members(
        counts, cliques, lambda sums, _: _skew(counts, sums), num_steps, rng
    )


def clump(
    proxies: npt.ArrayLike,
    num_groups: int,
    *,
    num_steps: int = 1000,
    seed: int = 0,
) -> list[list[int]]:
    """Chooses groups of replicas by proxies of their data.

    A proxy is a vector p_i that describes the data of replica i without giving
    it away: shares of labels, or the mean features of a few samples. The groups
    are chosen so that the mean proxy of each is like that of all:

        sum over the groups g of |mean of p_i over g - mean of all p_i|^2

    They are random at first. In each step two of them, chosen at random,
    exchange the two members by which the sum falls most, if any exchange lets
    it fall.

    Args:
        proxies: Array `[N, length]`. All numbers count alike, so those of
            different units should be scaled before, and counts of samples be
            divided by their sum.
        num_groups: Integer from 1 to N. The sizes differ by 1 at most.
        num_steps: Integer, the number of steps.
        seed: Integer, of the random numbers.

    Returns:
        List of groups, lists of ranks, in rising order, as `Cliques` takes
        them.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If an argument breaks its rule.

    Example:

    >>> mean_features = [[1.0, 0.2], [1.0, 0.2], [-1.0, 0.2], [-1.0, 0.2]]
    >>> groups = clump(mean_features, num_groups=2)
    >>> [sum(mean_features[i][0] for i in group) for group in groups]
    [0.0, 0.0]

    Source: the peer clumping of Abebe, Jannesari, "Addressing Data
    Heterogeneity in Decentralized Learning via Topological Pre-processing"
    (2022), with groups of one size found by exchanges.
    """
    rows = _rows("proxies", proxies, _PROXIES)
    validation.check_integer("num_groups", num_groups, 1)
    validation.check_integer("num_steps", num_steps, 0)
    validation.check_integer("seed", seed, 0)
    if num_groups > len(rows):
        raise ValueError(
            "`num_groups` must be at most the number of replicas, "
            f"{len(rows)}. Received: num_groups={num_groups}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    groups = [part.tolist() for part in np.array_split(order, num_groups)]

    def distance(sums: np.ndarray, size: int) -> np.ndarray:
        return np.square(sums / size).sum(axis=-1)

    return _exchange_members(
        rows - rows.mean(axis=0), groups, distance, num_steps, rng
    )


def skew(histograms: npt.ArrayLike, clique: Sequence[int]) -> float:
    """Returns how far the labels of a clique are from those of all data.

    Args:
        histograms: As of `greedy_cliques`.
        clique: List of ranks.

    Returns:
        Float in [0, 2], the sum over the labels of the differences of shares.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:

    >>> skew([[9, 0], [0, 9]], [0]), skew([[9, 0], [0, 9]], [0, 1])
    (1.0, 0.0)
    """
    counts = _counts(histograms)
    ranks = _ranks(clique, len(counts))
    return float(_skew(counts, counts[ranks].sum(axis=0)))


def _exchange_members(
    rows: np.ndarray,
    groups: list[list[int]],
    loss: _Loss,
    num_steps: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Groups, in rising order, after exchanges that let the loss fall."""
    groups = [*groups]
    for _ in range(num_steps if len(groups) > 1 else 0):
        first, second = rng.choice(len(groups), size=2, replace=False)
        pair = _best_exchange(rows, groups[first], groups[second], loss)
        groups[first], groups[second] = pair
    return sorted(sorted(group) for group in groups)


def _best_exchange(
    rows: np.ndarray, first: list[int], second: list[int], loss: _Loss
) -> tuple[list[int], list[int]]:
    """Two groups after the exchange of members that is best, if any is."""
    # What the first group gains, and the second one loses, by each exchange.
    gain = rows[second] - rows[first][:, np.newaxis]
    sums = rows[first].sum(axis=0), rows[second].sum(axis=0)
    sizes = len(first), len(second)
    now = loss(sums[0], sizes[0]) + loss(sums[1], sizes[1])
    then = loss(sums[0] + gain, sizes[0]) + loss(sums[1] - gain, sizes[1])
    i, j = np.unravel_index(np.argmin(then), then.shape)
    # Rounding is no gain.
    if then[i, j] >= now * (1 - 1e-9):
        return first, second
    first, second = [*first], [*second]
    first[i], second[j] = second[j], first[i]
    return first, second


def _skew(counts: np.ndarray, of_clique: np.ndarray) -> np.ndarray:
    """The skews of cliques by how many samples of each label they have.

    Args:
        counts: Array `[N, labels]`.
        of_clique: Array `[..., labels]`.
    """
    of_all = counts.sum(axis=0)
    shares = of_clique / of_clique.sum(axis=-1, keepdims=True)
    return np.abs(shares - of_all / of_all.sum()).sum(axis=-1)


def _counts(histograms: npt.ArrayLike) -> np.ndarray:
    """Histograms as an array, checked."""
    counts = _rows("histograms", histograms, _HISTOGRAMS)
    are_negative = np.any(counts < 0, axis=1)
    for what, are_wrong in (
        ("negative numbers", are_negative),
        ("no samples", ~np.any(counts, axis=1)),
    ):
        if are_wrong.any():
            raise _wrong_rows("histograms", _HISTOGRAMS, what, are_wrong)
    return counts


def _rows(name: str, values: npt.ArrayLike, rule: str) -> np.ndarray:
    """Finite rows, one of each replica, as an array."""
    try:
        rows = np.asarray(values, float)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be {rule}. Received: {name}={values!r}"
        ) from None
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"`{name}` must be {rule}. Received: the shape {rows.shape}"
        )
    are_wrong = ~np.isfinite(rows).all(axis=1)
    if are_wrong.any():
        raise _wrong_rows(name, rule, "NaN or infinity", are_wrong)
    return rows


def _wrong_rows(
    name: str, rule: str, what: str, are_wrong: np.ndarray
) -> ValueError:
    replicas = np.flatnonzero(are_wrong).tolist()
    return ValueError(
        f"`{name}` must be {rule}. Received: {what} of the replicas {replicas}"
    )


def _ranks(clique: Sequence[int], num_replicas: int) -> list[int]:
    """A clique as a list, checked."""
    try:
        ranks = [*map(operator.index, clique)]
    except TypeError:
        ranks = []
    if (
        not ranks
        or len({*ranks}) < len(ranks)
        or not all(0 <= rank < num_replicas for rank in ranks)
    ):
        raise ValueError(
            "`clique` must be a list of different ranks from 0 to "
            f"{num_replicas - 1}. Received: clique={clique!r}"
        )
    return ranks
