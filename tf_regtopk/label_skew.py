"""Cliques of replicas whose data, taken together, is like the data of all.

For `Cliques` of `DecentralizedOptimizer`, where the data of the replicas
differs. Everything is computed before training, by NumPy.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tf_regtopk import validation


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
    counts = _checked(histograms)
    validation.check_integer("clique_size", clique_size, 1)
    validation.check_integer("num_steps", num_steps, 0)
    validation.check_integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts)).tolist()
    cliques = [
        order[start : start + clique_size]
        for start in range(0, len(order), clique_size)
    ]
    for _ in range(num_steps if len(cliques) > 1 else 0):
        first, second = rng.choice(len(cliques), size=2, replace=False)
        pair = _best_exchange(counts, cliques[first], cliques[second])
        cliques[first], cliques[second] = pair
    return sorted(sorted(clique) for clique in cliques)


def skew(histograms: npt.ArrayLike, clique: Sequence[int]) -> float:
    """Returns how far the labels of a clique are from those of all data.

    Args:
        histograms: As of `greedy_cliques`.
        clique: List of ranks.

    Returns:
        Float in [0, 2], the sum over the labels of the differences of shares.

    Example:

    >>> skew([[9, 0], [0, 9]], [0]), skew([[9, 0], [0, 9]], [0, 1])
    (1.0, 0.0)
    """
    counts = _checked(histograms)
    return float(_skew(counts, counts[[*clique]].sum(axis=0)))


def _best_exchange(
    counts: np.ndarray, first: list[int], second: list[int]
) -> tuple[list[int], list[int]]:
    """Two cliques after the exchange of members that is best, if any is."""
    # What the first clique gains, and the second one loses, by each exchange.
    gain = counts[second] - counts[first][:, np.newaxis]
    sums = counts[first].sum(axis=0), counts[second].sum(axis=0)
    now = sum(_skew(counts, of_clique) for of_clique in sums)
    then = _skew(counts, sums[0] + gain) + _skew(counts, sums[1] - gain)
    i, j = np.unravel_index(np.argmin(then), then.shape)
    # Rounding is no gain.
    if then[i, j] > now - 1e-9:
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


def _checked(histograms: npt.ArrayLike) -> np.ndarray:
    counts = np.asarray(histograms, float)
    if (
        counts.ndim != 2
        or not counts.size
        or not np.isfinite(counts).all()
        or (counts < 0).any()
        or not counts.sum(axis=1).all()
    ):
        raise ValueError(
            "`histograms` must be an array [replicas, labels] of numbers of "
            "samples, with some of each replica. Received: "
            f"histograms={histograms!r}"
        )
    return counts
