"""Topologies of decentralised training: rings, grids and others."""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import keras
import numpy as np

from tf_regtopk import validation
from tf_regtopk.distribute import mixing


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Complete(mixing.MixingTopology):
    """Every replica meets all others: the mean of all in each step.

    Example:

    >>> Complete().mixing_matrices(2).tolist()
    [[[0.5, 0.5], [0.5, 0.5]]]
    """

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        return (mixing.one_round([range(num_replicas)]),)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Ring(mixing.MixingTopology):
    """Every replica meets the two beside it.

    Example:

    >>> Ring().rounds(4)
    ((((0, 1), (2, 3)), ((1, 2), (0, 3))),)
    >>> round(Ring().spectral_gap(8), 4)
    0.1953
    """

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        n = num_replicas
        return (mixing.matchings((i, (i + 1) % n) for i in range(n)),)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Torus(mixing.MixingTopology):
    """Replicas in rows and columns; each meets those above, below and beside.

    Args:
        rows: Integer, by which the number of replicas can be divided, or None
            for as many rows as make it most like a square.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Torus().messages(16)
    4.0
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            self._check_integer("rows", 1)

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        n, rows = num_replicas, self.rows
        if rows is None:
            rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if n % rows:
            raise _unsuitable(self, f"a multiple of {rows}", n)
        columns = n // rows

        def at(row: int, column: int) -> int:
            return row % rows * columns + column % columns

        places = [*itertools.product(range(rows), range(columns))]
        return (
            mixing.matchings(
                (at(row, column), other)
                for row, column in places
                for other in (at(row, column + 1), at(row + 1, column))
            ),
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Exponential(mixing.MixingTopology):
    """Every replica meets those at a distance of 1, 2, 4, ... ranks.

    Example:

    >>> Exponential().messages(8)
    5.0
    """

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        n = num_replicas
        return (
            mixing.matchings(
                (i, (i + hop) % n) for i in range(n) for hop in _hops(n)
            ),
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class OnePeerExponential(mixing.MixingTopology):
    """Every replica meets one other a step, at a distance of 1, 2, 4, ...

    In step t replica i meets `i XOR 2^t`. Each sends one payload a step,
    however many replicas there are, and after log2 N steps all have the mean
    of all. The number of replicas must be a power of two.

    Args:
        directed: Boolean. Whether replica i sends to `i + 2^t` and hears from
            `i - 2^t` (mod N) instead, for any number of replicas, with the same
            bytes. The mean is exact for powers of two only: of six replicas
            each weighs 1/4 or 1/8 after three steps.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> OnePeerExponential().rounds(4)
    ((((0, 1), (2, 3)),), (((0, 2), (1, 3)),))
    >>> OnePeerExponential().messages(64), OnePeerExponential().spectral_gap(64)
    (1.0, 1.0)
    >>> directed = OnePeerExponential(directed=True)
    >>> directed.rounds(3)
    ((((0, 1, 2),),), (((0, 2, 1),),))
    >>> directed.messages(6), round(directed.spectral_gap(6), 2)
    (1.0, 0.4)

    Source: Ying, Yuan, Chen, Hu, Pan, Yin, "Exponential Graph is Provably
    Efficient for Decentralized Deep Training" (2021).
    """

    directed: bool = False

    def __post_init__(self) -> None:
        validation.check_boolean("directed", self.directed)

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        n = num_replicas
        if self.directed:
            return tuple((_cycles(n, hop),) for hop in _hops(n)) or ((),)
        if n & (n - 1):
            raise _unsuitable(
                self, "a power of two (`directed=True` suits any number)", n
            )
        return tuple(
            mixing.one_round((i, i ^ hop) for i in range(n) if i < i ^ hop)
            for hop in _hops(n)
        ) or ((),)

    def mixing_matrices(self, num_replicas: int) -> np.ndarray:
        if not self.directed:
            return super().mixing_matrices(num_replicas)
        own = np.eye(num_replicas)
        # Row i of what is rolled by h rows has its 1 in column i - h.
        matrices = [(own + np.roll(own, h, 0)) / 2 for h in _hops(num_replicas)]
        return np.stack(matrices or [own])


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Grid(mixing.MixingTopology):
    """Replicas on a grid of `side^d` points, of which the lines meet in turn.

    In step t the lines along axis t meet, so that all have the mean of all
    after d steps. The averaging of Moshpit SGD, without replicas that come and
    go.

    Args:
        side: Integer of at least 2, of which the number of replicas is a power.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Grid(side=2).rounds(4)
    ((((0, 2), (1, 3)),), (((0, 1), (2, 3)),))

    Source: Ryabinin, Gorbunov, Plokhotnyuk, Pekhimenko, "Moshpit SGD" (2021).
    """

    side: int

    def __post_init__(self) -> None:
        self._check_integer("side", 2)

    def rounds(self, num_replicas: int) -> Sequence[mixing.Step]:
        n, dimensions = num_replicas, 0
        while self.side**dimensions < n:
            dimensions += 1
        if self.side**dimensions != n:
            raise _unsuitable(self, f"a power of {self.side}", n)
        points = np.arange(n).reshape([self.side] * dimensions)
        return tuple(
            mixing.one_round(
                np.moveaxis(points, axis, -1).reshape(-1, self.side)
            )
            for axis in range(dimensions)
        ) or ((),)


def _hops(num_replicas: int) -> list[int]:
    """The powers of two below the number of replicas."""
    return [2**t for t in range((num_replicas - 1).bit_length())]


def _cycles(num_replicas: int, hop: int) -> mixing.Round:
    """The cycles by which each replica sends to the one at a distance."""
    num_cycles = math.gcd(num_replicas, hop)
    length = num_replicas // num_cycles
    return tuple(
        mixing.Cycle((first + hop * i) % num_replicas for i in range(length))
        for first in range(num_cycles)
    )


def _unsuitable(
    topology: mixing.MixingTopology, rule: str, num_replicas: int
) -> ValueError:
    return ValueError(
        f"`topology={topology!r}` must have a number of replicas that is "
        f"{rule}. Received: {num_replicas} replicas"
    )
