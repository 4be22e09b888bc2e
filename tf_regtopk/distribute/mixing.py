r"""Topologies of decentralised training: who averages weights with whom.

In step t each replica i replaces its weights by an average of its neighbours':

    x_i = sum over j of W_ij x_j        W = mixing_matrices(N)[t mod T]

Every row and every column of W adds up to 1, so that the mean of all replicas
stays as it is. How fast the replicas come together is up to `spectral_gap`.
"""

import abc
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import itertools
from typing import TypeAlias

import numpy as np

from tf_regtopk.distribute import topology as topology_lib

# The ranks of replicas that meet, each of which receives what all of them send.
# A `Cycle` is one as well.
Group: TypeAlias = tuple[int, ...]
# Groups that meet at the same time: a replica is in one of them, or in none.
Round: TypeAlias = tuple[Group, ...]
# The rounds of one step.
Step: TypeAlias = tuple[Round, ...]


class Cycle(tuple[int, ...]):
    """A group in which each replica sends to the next one only.

    The last one sends to the first. A topology that has cycles needs
    `mixing_matrices` of its own.
    """

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class MixingTopology(topology_lib.Topology):
    """Base class: who averages weights with whom, in a sequence of T steps.

    For `DecentralizedOptimizer`. A subclass is a frozen dataclass, registered
    with `keras.saving.register_keras_serializable`. It says in `rounds` who
    meets; the weights of the average follow from the graph of these meetings,
    unless the subclass has `mixing_matrices` of its own.
    """

    @abc.abstractmethod
    def rounds(self, num_replicas: int) -> Sequence[Step]:
        """Returns who meets whom, for each of the T steps.

        Args:
            num_replicas: N.

        Returns:
            For each step a tuple of rounds, which take place one after the
            other. A round is a tuple of groups of at least two ranks; no rank
            is in two groups of a round. A group may be a `Cycle`.

        Raises:
            ValueError: If the topology does not suit so many replicas.
        """

    def mixing_matrices(self, num_replicas: int) -> np.ndarray:
        """Returns W of each step, an array `[T, N, N]`.

        With the weights of Metropolis and Hastings: replicas i and j that meet
        weigh `1 / (1 + max(degree_i, degree_j))`, and each replica gives itself
        what is left of 1.

        Args:
            num_replicas: N.
        """
        return np.stack(
            [
                _metropolis_hastings(step, num_replicas)
                for step in self.rounds(num_replicas)
            ]
        )

    def gradient_groups(self, num_replicas: int) -> Round:
        """Returns the groups that also average their gradients, in each step.

        Args:
            num_replicas: N.
        """
        del num_replicas
        return ()

    def spectral_gap(self, num_replicas: int) -> float:
        """Returns 1 - rho, where the distance to the mean falls by rho a step.

        rho is the largest factor, of all T steps together its T-th root. 1 says
        that T steps reach the mean of all replicas exactly, 0 that the replicas
        never come together.

        Args:
            num_replicas: N.
        """
        matrices = self.mixing_matrices(num_replicas)
        product = np.eye(num_replicas)
        for matrix in matrices:
            product = matrix @ product
        factor = float(np.linalg.norm(product - 1 / num_replicas, 2))
        return 1 - factor ** (1 / len(matrices)) if factor > 1e-12 else 1.0

    def messages(self, num_replicas: int) -> float:
        """Returns how many payloads a replica sends in a step, on average.

        Args:
            num_replicas: N.
        """
        steps = self.rounds(num_replicas)
        sent = sum(len(sendings(group)) for group in _groups(steps))
        return sent / (len(steps) * num_replicas)

    def sent_bytes(
        self, num_bytes: int, cluster: topology_lib.Cluster
    ) -> float:
        return self.messages(cluster.num_replicas) * num_bytes

    def worker_sent_bytes(
        self, num_bytes: int, cluster: topology_lib.Cluster
    ) -> float:
        steps = self.rounds(cluster.num_replicas)
        own = cluster.replicas_per_worker
        leaving = sum(
            i // own != j // own
            for group in _groups(steps)
            for i, j in sendings(group)
        )
        return leaving / (len(steps) * cluster.num_workers) * num_bytes


def sendings(group: Group) -> list[tuple[int, int]]:
    """Returns the pairs `(giver, receiver)` of a group.

    Args:
        group: Ranks.

    Example:

    >>> sendings((4, 7)), sendings(Cycle([1, 2, 5]))
    ([(4, 7), (7, 4)], [(1, 2), (2, 5), (5, 1)])
    """
    if isinstance(group, Cycle):
        return [*zip(group, (*group[1:], group[0]), strict=True)]
    return [*itertools.permutations(group, 2)]


def one_round(groups: Iterable[Iterable[int]]) -> Step:
    """The one round of some groups, without those of a single rank."""
    in_order = (tuple(sorted(map(int, group))) for group in groups)
    found = tuple(group for group in in_order if len(group) > 1)
    return (found,) if found else ()


def matchings(edges: Iterable[Iterable[int]]) -> Step:
    """Rounds of pairs, so that all pairs meet once in as few as can be found.

    Args:
        edges: Pairs of ranks. A pair that comes again, or of one rank, is left
            out.
    """
    rounds: list[list[Group]] = []
    busy: list[set[int]] = []
    pairs = dict.fromkeys(tuple(sorted(map(int, edge))) for edge in edges)
    for pair in pairs:
        if pair[0] == pair[1]:
            continue
        free = (r for r, ranks in enumerate(busy) if not ranks & {*pair})
        place = next(free, len(rounds))
        if place == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[place].append(pair)
        busy[place].update(pair)
    return tuple(map(tuple, rounds))


def group_means(groups: Round, num_replicas: int) -> np.ndarray:
    """Returns the matrix by which each group takes its mean, `[N, N]`.

    Args:
        groups: Groups, of which no rank is in two. A replica in none of them
            keeps its own.
        num_replicas: N.

    Example:

    >>> group_means(((0, 2),), 3).tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    """
    weights = np.eye(num_replicas)
    for group in groups:
        weights[np.ix_(group, group)] = 1 / len(group)
    return weights


def _groups(steps: Sequence[Step]) -> Iterable[Group]:
    for step in steps:
        yield from itertools.chain(*step)


def _metropolis_hastings(step: Step, num_replicas: int) -> np.ndarray:
    meet = np.zeros((num_replicas, num_replicas), bool)
    for group in itertools.chain(*step):
        if isinstance(group, Cycle):
            raise ValueError(
                "A topology must have `mixing_matrices` of its own where its "
                f"`rounds` hold a `Cycle`. Received: {step!r}"
            )
        meet[np.ix_(group, group)] = True
    np.fill_diagonal(meet, False)
    degree = meet.sum(axis=1)
    larger = np.maximum(degree[:, np.newaxis], degree)
    matrix = np.where(meet, 1 / (1 + larger), 0.0)
    return matrix + np.diag(1 - matrix.sum(axis=1))
