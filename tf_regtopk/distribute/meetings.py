"""Tables of whom one worker meets, in arrays of the T steps."""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np

from tf_regtopk import keras_internals
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import topology as topology_lib


class Meeting(NamedTuple):
    """One round of groups in which all receive what all send.

    Args:
        sizes: int32 array `[T]`, the size of the group, 1 for none.
        keys: int32 array `[T]`, the key of the group.
        others: int32 array `[T, rows]`, the places of the others in the group,
            whose members are in TensorFlow's order.
    """

    sizes: np.ndarray
    keys: np.ndarray
    others: np.ndarray


class Pass(NamedTuple):
    """One round of cycles, in which each sends to the next one.

    Args:
        takes_part: Bool array `[T]`, whether this worker is in a cycle.
        keys_to: int32 array `[T]`, the key of the pair with the next one.
        keys_from: int32 array `[T]`, of that with the one before.
        is_up: int32 array `[T]`, 1 if the next one has a larger rank.
        is_from_below: int32 array `[T]`, 1 if the one before has a smaller
            rank.
    """

    takes_part: np.ndarray
    keys_to: np.ndarray
    keys_from: np.ndarray
    is_up: np.ndarray
    is_from_below: np.ndarray


class Table(NamedTuple):
    """The replicas that one worker meets.

    What arrives are rows: the worker's own vector, then those of the others in
    its group of each round, and then one of each pass. Where the group is
    smaller than the largest of that round, or where there is none, the rows
    that are left repeat another.

    Args:
        rounds: List of `Meeting`s.
        passes: List of `Pass`es.
        senders: int32 array `[T, M]`, the senders of all rows.
        is_first: Bool array `[T, M]`, False for a row that repeats another.
    """

    rounds: list[Meeting]
    passes: list[Pass]
    senders: np.ndarray
    is_first: np.ndarray


def table(steps: Sequence[mixing.Step], cluster: topology_lib.Cluster) -> Table:
    """Returns the table of one worker; asks for group keys as all workers do.

    Args:
        steps: For each of the T steps its rounds, as of
            `MixingTopology.rounds`.
        cluster: `Cluster`, of which the worker is one.
    """
    rank = cluster.worker
    meetings = _of_kind(steps, is_cycle=False)
    passes = _of_kind(steps, is_cycle=True)
    keys = _keys(meetings, passes)
    parts = [
        *(_meeting(of_round, cluster, keys) for of_round in meetings),
        *(_pass(of_round, rank, keys) for of_round in passes),
    ]
    own = np.full([len(steps), 1], rank, np.int32)
    senders = np.concatenate([own, *(of_part for _, of_part in parts)], axis=1)
    found = [part for part, _ in parts]
    return Table(
        [part for part in found if isinstance(part, Meeting)],
        [part for part in found if isinstance(part, Pass)],
        senders,
        np.array([_are_first(ranks) for ranks in senders.tolist()]),
    )


def _of_kind(
    steps: Sequence[mixing.Step], is_cycle: bool
) -> list[tuple[mixing.Round, ...]]:
    """For each round of groups, or of cycles, those of the T steps."""
    chosen = [
        [
            groups
            for groups in (
                tuple(g for g in r if isinstance(g, mixing.Cycle) == is_cycle)
                for r in step
            )
            if groups
        ]
        for step in steps
    ]
    return [*itertools.zip_longest(*chosen, fillvalue=())]


def _keys(
    meetings: Sequence[Sequence[mixing.Round]],
    passes: Sequence[Sequence[mixing.Round]],
) -> dict[mixing.Group, int]:
    """The keys of groups, and of pairs that are next to each other."""
    groups = [g for of_round in meetings for r in of_round for g in r]
    groups += [
        _pair(*sending)
        for of_round in passes
        for r in of_round
        for cycle in r
        for sending in mixing.sendings(cycle)
    ]
    return dict(zip(groups, keras_internals.group_keys(groups), strict=True))


def _meeting(
    of_steps: Sequence[mixing.Round],
    cluster: topology_lib.Cluster,
    keys: dict[mixing.Group, int],
) -> tuple[Meeting, np.ndarray]:
    """A round, and the senders of its rows, `[T, rows]`."""
    rank = cluster.worker
    own = [
        next((g for g in groups if rank in g), (rank,)) for groups in of_steps
    ]
    largest = max(map(len, itertools.chain(*of_steps)))
    others = []
    members = [cluster.in_order(group) for group in own]
    for group in members:
        found = [i for i, other in enumerate(group) if other != rank]
        others.append((found + [0] * largest)[: largest - 1])
    senders = [
        [group[i] for i in places]
        for group, places in zip(members, others, strict=True)
    ]
    meeting = Meeting(
        np.array([len(group) for group in own], np.int32),
        np.array([keys.get(group, 0) for group in own], np.int32),
        np.array(others, np.int32),
    )
    return meeting, np.array(senders, np.int32)


def _pass(
    of_steps: Sequence[mixing.Round],
    rank: int,
    keys: dict[mixing.Group, int],
) -> tuple[Pass, np.ndarray]:
    """A round of cycles, and the senders of its row, `[T, 1]`."""
    # Replicas that are in no cycle are the next ones of themselves.
    to, before = np.full([2, len(of_steps)], rank, np.int32)
    for t, cycles in enumerate(of_steps):
        for giver, receiver in itertools.chain(*map(mixing.sendings, cycles)):
            if giver == rank:
                to[t] = receiver
            if receiver == rank:
                before[t] = giver
    found = Pass(
        to != rank,
        np.array([keys.get(_pair(rank, i), 0) for i in to], np.int32),
        np.array([keys.get(_pair(i, rank), 0) for i in before], np.int32),
        (to > rank).astype(np.int32),
        (before < rank).astype(np.int32),
    )
    return found, before[:, np.newaxis]


def _pair(giver: int, receiver: int) -> mixing.Group:
    return (min(giver, receiver), max(giver, receiver))


def _are_first(values: Sequence[int]) -> list[bool]:
    """Flags of the values that come for the first time."""
    return [value not in values[:i] for i, value in enumerate(values)]
