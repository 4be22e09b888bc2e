"""The exchange of a replica with its neighbours, by a table of who meets."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import operator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import meetings
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.distribute import watchdog

# Float32 adds up weights exactly that are multiples of this.
_UNIT = 2.0**-24


def differences(
    topology: mixing.MixingTopology, num_replicas: int
) -> np.ndarray:
    """Returns W - I of each step, an array `[T, N, N]`.

    Its rows add up to exactly 0 in float32, because replicas with the same
    weights would else drift away together, a little in each step.

    Args:
        topology: `MixingTopology`.
        num_replicas: N.

    Raises:
        ValueError: If the rows and columns of W do not add up to 1.

    Example:

    >>> from tf_regtopk.distribute import mixing_topologies
    >>> differences(mixing_topologies.Complete(), 2).tolist()
    [[[-0.5, 0.5], [0.5, -0.5]]]
    """
    matrices = np.asarray(topology.mixing_matrices(num_replicas), np.float64)
    num_steps = len(rounds_of(topology, num_replicas))
    if matrices.shape != (num_steps, num_replicas, num_replicas):
        raise ValueError(
            "`mixing_matrices` of a topology must be a matrix of all replicas "
            f"for each step, {(num_steps, num_replicas, num_replicas)}. "
            f"Received: the shape {matrices.shape}"
        )
    sums = [matrices.sum(axis=axis) for axis in (1, 2)]
    if not np.allclose(sums, 1, rtol=0, atol=1e-6):
        raise ValueError(
            "`mixing_matrices` of a topology must have rows and columns that "
            f"add up to 1. Received: {topology!r} with the sums {sums}"
        )
    off_diagonal = 1 - np.eye(num_replicas)
    taken = np.round(matrices / _UNIT) * _UNIT * off_diagonal
    own = taken.sum(axis=2)[..., np.newaxis] * np.eye(num_replicas)
    return taken - own


def rounds_of(
    topology: mixing.MixingTopology, num_replicas: int
) -> tuple[mixing.Step, ...]:
    """Returns who meets in each step, checked, in tuples of integers.

    Args:
        topology: `MixingTopology`, perhaps a user's own.
        num_replicas: N.

    Raises:
        ValueError: If `rounds` returns something else.
    """
    received = topology.rounds(num_replicas)
    try:
        steps = tuple(
            tuple(
                tuple(_group_of(group) for group in groups) for groups in step
            )
            for step in received
        )
    except TypeError:
        steps = ()
    ranks = [
        rank
        for step in steps
        for groups in step
        for group in groups
        for rank in group
    ]
    if not steps or not all(0 <= rank < num_replicas for rank in ranks):
        raise ValueError(
            "`rounds` of a topology must have for each step its rounds, for "
            "each round its groups, and for each group its ranks, from 0 to "
            f"{num_replicas - 1}. Received: {received!r}"
        )
    return steps


def check_meetings(steps: Sequence[mixing.Step], weights: np.ndarray) -> None:
    """Raises unless replicas meet all those of whom they take something.

    Args:
        steps: As of `rounds_of`.
        weights: As of `differences`.

    Raises:
        ValueError: If there is one that they do not meet, or a rank is in two
            groups of a round.
    """
    for t, (step, matrix) in enumerate(zip(steps, weights, strict=True)):
        for r, groups in enumerate(step):
            ranks = [*itertools.chain(*groups)]
            if len(set(ranks)) < len(ranks):
                raise ValueError(
                    "`rounds` of a topology must have each rank in at most one "
                    f"group of a round. Received: {groups} as round {r} of "
                    f"step {t}"
                )
        met = {
            (receiver, giver)
            for group in itertools.chain(*step)
            for giver, receiver in mixing.sendings(group)
        }
        taken = {(int(i), int(j)) for i, j in np.argwhere(matrix) if i != j}
        if taken - met:
            raise ValueError(
                "`rounds` of a topology must let replicas meet whose "
                "`mixing_matrices` are not 0. Received: no meeting of "
                f"{sorted(taken - met)} in step {t}"
            )


class Neighbours:
    """The replicas with which one exchanges vectors, in a sequence of T steps.

    Within one process the replicas exchange by an all-gather, and each reads
    what its neighbours have sent. Between workers the collectives of a step
    reach the neighbours only.

    To be created in the scope of the strategy, on all workers alike. All
    methods are for a replica context.

    Args:
        steps: For each of the T steps its rounds, as of
            `MixingTopology.rounds`.
        weights: Array `[T, N, N]`, what replica i takes of what j sends.

    Raises:
        ValueError: If a replica takes something of another that it does not
            meet, or the workers have several replicas each.
    """

    def __init__(
        self, steps: Sequence[mixing.Step], weights: np.ndarray
    ) -> None:
        self._cluster = topology_lib.Cluster.in_scope()
        _check_replicas_per_worker(self._cluster)
        check_meetings(steps, weights)
        self._num_steps = len(steps)
        self._is_emulated = self._cluster.num_workers == 1
        if self._is_emulated:
            n = self._cluster.num_replicas
            everyone = np.broadcast_to(np.arange(n), weights.shape)
            self._senders, self._weights = everyone, weights
            return
        rank = self._cluster.worker
        self._table = meetings.table(steps, self._cluster)
        self._senders = self._table.senders[:, np.newaxis]
        taken = np.take_along_axis(
            weights[:, rank], self._table.senders, axis=1
        )
        self._weights = (taken * self._table.is_first)[:, np.newaxis]
        self._first_key = keras_internals.take_instance_keys(
            2 * len(self._table.rounds) + 4 * len(self._table.passes)
        )

    def exchange(self, vector: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Gives this replica what its neighbours send.

        Args:
            vector: Tensor `[length]` of held words, of the same length on every
                replica and in every step.
            number: Scalar integer tensor, the number of steps before, the same
                on every replica.

        Returns:
            Tensor `[M, length]`, with the replica's own vector among them.
        """
        if self._is_emulated:
            return collectives.all_gather(vector)
        if tf.executing_eagerly():
            raise RuntimeError(
                "`DecentralizedOptimizer` must be used in a `tf.function` on "
                "several workers. Received: an eager step, as by `run_eagerly`"
            )
        received = watchdog.watched(lambda: self._meet(vector, number))
        return tf.concat(received, axis=0)

    def weights(self, number: tf.Tensor) -> tf.Tensor:
        """Returns what this replica takes of each row of `exchange`.

        Args:
            number: As of `exchange`.

        Returns:
            float32 tensor `[M]`.
        """
        return self._of_replica(self._weights, number, tf.float32)

    def senders(self, number: tf.Tensor) -> tf.Tensor:
        """Returns the rank of the sender of each row, an int32 tensor `[M]`.

        Args:
            number: As of `exchange`.
        """
        return self._of_replica(self._senders, number, tf.int32)

    def _of_replica(
        self, table: np.ndarray, number: tf.Tensor, dtype: tf.DType
    ) -> tf.Tensor:
        # TensorFlow keeps int32 in the memory of the host anyway.
        with tf.device("CPU:0"):
            rank = tf.constant(0)
            if self._is_emulated:
                rank = strategy_lib.replica_rank()
            place = tf.stack([self._place(number), tf.cast(rank, tf.int32)])
            return tf.gather_nd(tf.constant(table, dtype), place)

    def _place(self, number: tf.Tensor) -> tf.Tensor:
        """The step's place in the tables."""
        return tf.cast(number % self._num_steps, tf.int32)

    def _meet(self, vector: tf.Tensor, number: tf.Tensor) -> list[tf.Tensor]:
        """The rows that arrive in each round."""
        rounds, passes = self._table.rounds, self._table.passes

        def copies(num_rows: int | tf.Tensor) -> tf.Tensor:
            return tf.tile(vector[tf.newaxis], [num_rows, 1])

        with tf.device("CPU:0"):
            place = self._place(number)
            # The keys of the step before may still be in use.
            key = self._first_key + tf.cast(number % 2, tf.int32)
            rows = [vector[tf.newaxis]]
            for i, meeting in enumerate(rounds):
                rows.append(meet(meeting, copies, place, key + 2 * i))
            key += 2 * len(rounds)
            for i, one in enumerate(passes):
                rows.append(_pass_on(one, vector, place, key + 4 * i))
        return rows


def meet(
    meeting: meetings.Meeting,
    payloads_for: Callable[[int | tf.Tensor], tf.Tensor],
    place: tf.Tensor,
    instance_key: tf.Tensor,
) -> tf.Tensor:
    """Gives a worker the rows of the others in its group of one round.

    Args:
        meeting: `Meeting`, the round.
        payloads_for: Function of the size n of the group that returns a tensor
            `[n, length]`, of the same length for all sizes: the rows are for
            the members in their order.
        place: Scalar int32 tensor, the step's place in the tables.
        instance_key: Scalar int32 tensor.

    Returns:
        Tensor `[rows, length]`. A worker that is in no group gets rows of its
        own.
    """
    size = tf.constant(meeting.sizes)[place]
    num_rows = meeting.others.shape[1]
    own = payloads_for(num_rows)

    def exchange() -> tf.Tensor:
        received = keras_internals.exchange_in_group(
            payloads_for(size),
            size,
            tf.constant(meeting.keys)[place],
            instance_key,
        )
        return tf.gather(received, tf.constant(meeting.others)[place])

    meets = meeting.sizes > 1
    rows = (
        exchange() if meets.all() else tf.cond(size > 1, exchange, lambda: own)
    )
    return tf.ensure_shape(rows, own.shape)


def _pass_on(
    one: meetings.Pass,
    vector: tf.Tensor,
    place: tf.Tensor,
    instance_key: tf.Tensor,
) -> tf.Tensor:
    """The row of the replica before this one in a cycle."""

    def exchange() -> tf.Tensor:
        # Two replicas that send to each other are one group, so that the
        # directions need keys of their own.
        is_up, is_from_below = (
            tf.constant(flags)[place]
            for flags in (one.is_up, one.is_from_below)
        )
        return keras_internals.pass_on(
            vector,
            keras_internals.Link(
                tf.constant(one.keys_to)[place], instance_key + 2 * is_up
            ),
            keras_internals.Link(
                tf.constant(one.keys_from)[place],
                instance_key + 2 * is_from_below,
            ),
        )

    takes_part = one.takes_part
    if takes_part.all():
        row = exchange()
    else:
        row = tf.cond(tf.constant(takes_part)[place], exchange, lambda: vector)
    return tf.ensure_shape(row, vector.shape)[tf.newaxis]


def _group_of(ranks: Iterable[Any]) -> mixing.Group:
    """Ranks as integers; a cycle stays one."""
    kind = mixing.Cycle if isinstance(ranks, mixing.Cycle) else tuple
    return kind(map(operator.index, ranks))


def _check_replicas_per_worker(cluster: topology_lib.Cluster) -> None:
    if cluster.num_workers > 1 and cluster.replicas_per_worker > 1:
        raise ValueError(
            "`DecentralizedOptimizer` must have one replica on each worker, or "
            "one worker: start a worker for each device. Received: "
            f"{cluster.num_workers} workers of {cluster.replicas_per_worker} "
            "replicas each"
        )
