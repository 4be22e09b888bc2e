"""Answers to neighbours: to each of them something of its own."""

from collections.abc import Sequence
import functools
import itertools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import meetings
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import watchdog


def neighbours_of(weights: np.ndarray, is_mutual: bool) -> np.ndarray:
    """Returns the ranks of the neighbours of each replica in each step.

    Args:
        weights: Array `[T, N, N]`, what replica i takes of what j sends; the
            diagonal does not count.
        is_mutual: Whether i is a neighbour of j as well, wherever j is one of
            i.

    Returns:
        Integer array `[T, N, D]`, where D is the largest number of neighbours.
        A replica that has fewer is in its own row for the others.

    Example:

    >>> neighbours_of(np.array([[[0, 1, 0], [0, 0, 0], [0, 0, 0]]]), True)
    array([[[1],
            [0],
            [2]]])
    """
    n = weights.shape[-1]
    takes = (weights != 0) & ~np.eye(n, dtype=bool)
    if is_mutual:
        takes |= np.swapaxes(takes, 1, 2)
    # Of no neighbours at all there is one row, as TensorFlow stacks no rows.
    num_rows = max(1, int(takes.sum(axis=2).max()))
    ranks = np.tile(np.arange(n)[:, np.newaxis], [len(weights), 1, num_rows])
    for t, i in itertools.product(range(len(weights)), range(n)):
        found = np.flatnonzero(takes[t, i])
        ranks[t, i, : len(found)] = found
    return ranks


class Tables(NamedTuple):
    """The neighbours of all replicas, in arrays `[T, N, D]`.

    Args:
        ranks: int32 array, from `neighbours_of`.
        numbers: int32 array: by which number a replica knows each neighbour,
            the same one in each step in which the two meet: 0, 1, 2, ... The
            number after the largest one stands for the replica itself.
        taken: float32 array, what a replica takes of each neighbour, and 0 of
            itself.
        answers: int32 array: where each neighbour's answer is among those of
            all replicas, of which replica j has those from j D on. Of use only
            if all are mutual neighbours.
    """

    ranks: np.ndarray
    numbers: np.ndarray
    taken: np.ndarray
    answers: np.ndarray


def tables(weights: np.ndarray, is_mutual: bool) -> Tables:
    """Returns the `Tables` of all replicas.

    Args:
        weights: As of `neighbours_of`.
        is_mutual: As of `neighbours_of`.
    """
    ranks = neighbours_of(weights, is_mutual)
    taken = np.take_along_axis(weights, ranks, axis=2)
    taken[ranks == np.arange(ranks.shape[1])[:, np.newaxis]] = 0
    return Tables(
        ranks.astype(np.int32),
        _numbers_of(ranks).astype(np.int32),
        taken.astype(np.float32),
        _places_of_answers(ranks).astype(np.int32),
    )


class AnsweringNeighbours(neighbours.Neighbours):
    """Neighbours, each of which gets a vector of its own.

    A replica has D places for neighbours. Replicas with fewer than D of them
    have themselves in the places that are left, and take nothing of these.

    Args:
        steps: As of `Neighbours`.
        weights: As of `Neighbours`.
        answers: Whether `answer` is to be called. Both of two replicas that
            meet must receive then, so that no group may be a `Cycle`.

    Raises:
        ValueError: As of `Neighbours`, or if there is a `Cycle`.
    """

    def __init__(
        self, steps: Sequence[mixing.Step], weights: np.ndarray, answers: bool
    ) -> None:
        if answers:
            check_no_cycles(steps)
        super().__init__(steps, weights)
        self._tables = tables(weights, answers)
        self._places = self._tables.ranks
        # How many a replica tells apart in all T steps, perhaps with itself.
        self.num_told_apart = int(self._tables.numbers.max()) + 1
        if self._is_emulated:
            return
        rank = self._cluster.worker
        self._tables = Tables(*(t[:, rank : rank + 1] for t in self._tables))
        [ranks] = np.swapaxes(self._tables.ranks, 0, 1)
        self._places = _places_in(self._table.senders, ranks)[:, np.newaxis]
        self._answers_in_rounds = _answers_in_rounds(self._table, ranks)
        if answers:
            self._first_answer_key = keras_internals.take_instance_keys(
                2 * len(self._table.rounds)
            )

    def places(self, number: tf.Tensor) -> tf.Tensor:
        """Returns the rows of `exchange` that are the neighbours', `[D]`.

        Args:
            number: As of `exchange`.

        Returns:
            int32 tensor, in which places that are left have the replica's own.
        """
        return self._of_replica(self._places, number, tf.int32)

    def ranks(self, number: tf.Tensor) -> tf.Tensor:
        """Returns the ranks of the neighbours, an int32 tensor `[D]`.

        Args:
            number: As of `exchange`.
        """
        return self._of_replica(self._tables.ranks, number, tf.int32)

    def numbers(self, number: tf.Tensor) -> tf.Tensor:
        """Returns by which number a replica knows each neighbour, `[D]`.

        Args:
            number: As of `exchange`.

        Returns:
            int32 tensor of numbers below `num_told_apart`, the same one in each
            step in which two replicas meet.
        """
        return self._of_replica(self._tables.numbers, number, tf.int32)

    def taken(self, number: tf.Tensor) -> tf.Tensor:
        """Returns what this replica takes of each neighbour.

        Args:
            number: As of `exchange`.

        Returns:
            float32 tensor `[D]`, 0 in the places that are left.
        """
        return self._of_replica(self._tables.taken, number, tf.float32)

    def answer(self, vectors: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Tells each neighbour something, and hears what each has to tell.

        Args:
            vectors: Tensor `[D, length]` of held words: the rows are for the
                neighbours in the order of `ranks`.
            number: As of `exchange`.

        Returns:
            Tensor `[D, length]`: the rows are from the neighbours.
        """
        if self._is_emulated:
            gathered = collectives.all_gather(tf.reshape(vectors, [-1]))
            return tf.gather(
                tf.reshape(gathered, [-1, vectors.shape[1]]),
                self._of_replica(self._tables.answers, number, tf.int32),
            )
        received = watchdog.watched(lambda: self._answer(vectors, number))
        return tf.gather(tf.concat(received, axis=0), self.places(number))

    def _answer(self, vectors: tf.Tensor, number: tf.Tensor) -> list[tf.Tensor]:
        """The rows that arrive in each round, in the places of `exchange`."""
        with tf.device("CPU:0"):
            place = self._place(number)
            # The keys of the step before may still be in use.
            key = self._first_answer_key + tf.cast(number % 2, tf.int32)
            rows = [vectors[:1]]
            for i, (meeting, chosen) in enumerate(
                zip(self._table.rounds, self._answers_in_rounds, strict=True)
            ):
                of_members = tf.gather(vectors, tf.constant(chosen)[place])
                first = functools.partial(_first, of_members)
                rows.append(neighbours.meet(meeting, first, place, key + 2 * i))
        return rows


def check_no_cycles(steps: Sequence[mixing.Step]) -> None:
    """Raises if there is a replica that cannot answer.

    Args:
        steps: As of `Neighbours`.

    Raises:
        ValueError: If there is a `Cycle`.
    """
    groups = itertools.chain(*itertools.chain(*steps))
    if any(isinstance(group, mixing.Cycle) for group in groups):
        raise ValueError(
            "`topology` must be one whose replicas hear from those they send "
            "to, such as `Ring()`, because neighbours answer each other; or "
            "set `CrossGradients(alpha=0)`, which has no answers. Received: a "
            "topology with a `Cycle`"
        )


def _first(rows: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    return rows[:count]


def _numbers_of(ranks: np.ndarray) -> np.ndarray:
    """The numbers by which each replica knows its neighbours, `[T, N, D]`."""
    num_replicas = ranks.shape[1]
    found = [
        np.setdiff1d(ranks[:, i], [i]).tolist() for i in range(num_replicas)
    ]
    left = max(map(len, found))
    numbers = np.full_like(ranks, left)
    for (t, i, d), rank in np.ndenumerate(ranks):
        if rank != i:
            numbers[t, i, d] = found[i].index(rank)
    return numbers


def _places_of_answers(ranks: np.ndarray) -> np.ndarray:
    """The place of each answer among those of all replicas, `[T, N, D]`."""
    num_rows = ranks.shape[2]
    places = np.empty_like(ranks)
    for (t, i, d), rank in np.ndenumerate(ranks):
        [found] = np.nonzero(ranks[t, rank] == i)
        # A replica answers itself, or nobody, in its own place.
        row = found[0] if rank != i and len(found) else d
        places[t, i, d] = rank * num_rows + row
    return places


def _places_in(senders: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The place of the first row of each rank in what arrives, `[T, D]`."""
    found = senders[:, np.newaxis] == ranks[:, :, np.newaxis]
    return np.argmax(found, axis=2)


def _answers_in_rounds(
    table: meetings.Table, ranks: np.ndarray
) -> list[np.ndarray]:
    """For each round which answer each member of the group gets.

    Args:
        table: `Table` of a worker.
        ranks: Array `[T, D]`, its neighbours.

    Returns:
        For each round an int32 array `[T, size of the largest group]`. A member
        that is no neighbour, as the worker itself, gets the first answer, which
        it does not read.
    """
    found = []
    first = 1
    for meeting in table.rounds:
        num_steps, num_others = meeting.others.shape
        chosen = np.zeros([num_steps, num_others + 1], np.int32)
        for t in range(num_steps):
            for c in range(meeting.sizes[t] - 1):
                other = table.senders[t, first + c]
                [places] = np.nonzero(ranks[t] == other)
                if len(places):
                    chosen[t, meeting.others[t, c]] = places[0]
        found.append(chosen)
        first += num_others
    return found
