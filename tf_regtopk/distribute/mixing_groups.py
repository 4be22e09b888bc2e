"""Topologies of groups of replicas, and around another topology."""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import itertools
import math
import operator
from typing import Any

import keras
import numpy as np

from tf_regtopk import validation
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_topologies


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Cliques(mixing.MixingTopology):
    """All of a clique meet, and one replica of each clique one of each other.

    The cliques should be such that the data of each is like the data of all.

    Args:
        cliques: List of lists of ranks, in which each rank is once.
        average_gradients: Boolean. Whether the replicas of a clique also take
            the mean of their gradients, which send whole gradients: then each
            step follows the data of a whole clique, also with momentum.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Cliques([[0, 1], [2, 3]]).rounds(4)
    ((((0, 1), (2, 3)), ((0, 2),)),)

    Source: Bellet, Kermarrec, Lavoie, "D-Cliques" (2021).
    """

    cliques: Sequence[Sequence[int]]
    average_gradients: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cliques", _parts("cliques", self.cliques))
        validation.check_boolean("average_gradients", self.average_gradients)

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        _check_parts("cliques", self.cliques, num_replicas)
        num_links = [0] * num_replicas
        links = []
        for pair in itertools.combinations(self.cliques, 2):
            # Those that have the fewest links so far get the next one.
            link = [min(clique, key=num_links.__getitem__) for clique in pair]
            for rank in link:
                num_links[rank] += 1
            links.append(link)
        return ((*mixing.one_round(self.cliques), *mixing.matchings(links)),)

    def gradient_groups(self, num_replicas: int) -> mixing.Round:
        if not self.average_gradients:
            return ()
        _check_parts("cliques", self.cliques, num_replicas)
        return tuple(itertools.chain(*mixing.one_round(self.cliques)))


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class PeriodicGlobalAveraging(mixing.MixingTopology):
    """Another topology, but every so many steps the mean of all replicas.

    Args:
        topology: `MixingTopology` of the other steps.
        every: Integer of at least 1, steps from one mean of all to the next.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> ring = mixing_topologies.Ring()
    >>> PeriodicGlobalAveraging(ring, every=10).spectral_gap(16)
    1.0
    """

    topology: mixing.MixingTopology
    every: int

    def __post_init__(self) -> None:
        validation.check_instance(
            "topology", self.topology, mixing.MixingTopology, "Ring()"
        )
        self._check_integer("every", 1)

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        steps = self.topology.rounds(num_replicas)
        [mean] = mixing_topologies.Complete().rounds(num_replicas)
        return tuple(
            mean if is_mean else steps[t % len(steps)]
            for t, is_mean in enumerate(self._are_means(len(steps)))
        )

    def mixing_matrices(self, num_replicas: int) -> np.ndarray:
        matrices = self.topology.mixing_matrices(num_replicas)
        [mean] = mixing_topologies.Complete().mixing_matrices(num_replicas)
        return np.stack(
            [
                mean if is_mean else matrices[t % len(matrices)]
                for t, is_mean in enumerate(self._are_means(len(matrices)))
            ]
        )

    def gradient_groups(self, num_replicas: int) -> mixing.Round:
        return self.topology.gradient_groups(num_replicas)

    def _are_means(self, num_steps: int) -> list[bool]:
        """Flags of the steps of a period that take the mean of all."""
        period = math.lcm(num_steps, self.every)
        return [(t + 1) % self.every == 0 for t in range(period)]


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class RingPass(mixing.MixingTopology):
    """Within each class, every replica hands its weights to the next one.

    Each replica sends one payload a step. Nothing is averaged, so
    `PeriodicGlobalAveraging` belongs around this one.

    Args:
        classes: List of lists of ranks, in which each rank is once.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> RingPass([[0, 1, 2]]).mixing_matrices(3)[0].tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    Source: the rings of Li, Li, Zhang, et al., "FedHiSyn" (2022).
    """

    classes: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _parts("classes", self.classes))

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        _check_parts("classes", self.classes, num_replicas)
        cycles = tuple(
            mixing.Cycle(ranks) for ranks in self.classes if len(ranks) > 1
        )
        return ((cycles,) if cycles else (),)

    def mixing_matrices(self, num_replicas: int) -> np.ndarray:
        _check_parts("classes", self.classes, num_replicas)
        matrix = np.zeros((num_replicas, num_replicas))
        for ranks in self.classes:
            for giver, receiver in mixing.sendings(mixing.Cycle(ranks)):
                matrix[receiver, giver] = 1
        return matrix[np.newaxis]


def _parts(name: str, parts: Any) -> tuple[mixing.Group, ...]:
    """Groups of ranks as tuples, in the order given."""
    try:
        found = tuple(tuple(map(operator.index, part)) for part in parts)
    except TypeError:
        found = ()
    if not found or not all(found):
        raise ValueError(
            f"`{name}` must be a list of lists of ranks such as `[[0, 1], "
            f"[2, 3]]`. Received: {name}={parts!r}"
        )
    return found


def _check_parts(
    name: str, parts: Iterable[Iterable[int]], num_replicas: int
) -> None:
    """Raises unless each rank is in one part."""
    if sorted(itertools.chain(*parts)) != [*range(num_replicas)]:
        raise ValueError(
            f"`{name}` must hold each rank from 0 to {num_replicas - 1} once. "
            f"Received: {name}={parts!r}"
        )
