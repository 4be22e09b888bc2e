r"""Topologies: who exchanges gradients with whom, and what bytes that costs.

A topology answers five questions of a step:

    who takes part        `replicas_per_participant`
    what is summed first  `sum_within`, before entries are selected
    how payloads go       `exchange`
    what that costs       `sent_bytes`, `worker_sent_bytes`
    may lengths vary      `can_vary_length`

The step, the wire report and the checks ask the topology, so that another one
is a class of its own. `sizes/exchanges.py` counts the bytes, because the cost
model of `advise` needs them without TensorFlow.
"""

import abc
from collections.abc import Sequence
import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk import keras_internals
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.distribute import watchdog
from tf_regtopk.sizes import exchanges


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The replicas that train together, as one of their processes sees them.

    Args:
        num_replicas: Number of replicas on all workers.
        num_workers: Number of workers, which have as many replicas each.
        worker: Rank of this process's worker.
        has_chief: Whether the first worker is of the job "chief".

    Example:

    >>> Cluster(num_replicas=8, num_workers=2).replicas_per_worker
    4
    """

    num_replicas: int
    num_workers: int = 1
    worker: int = 0
    has_chief: bool = False

    @classmethod
    def in_scope(cls) -> "Cluster":
        """Returns the cluster of the `tf.distribute.Strategy` in scope."""
        strategy = tf.distribute.get_strategy()
        worker, num_workers = strategy_lib.worker_number(strategy)
        return cls(
            strategy.num_replicas_in_sync,
            num_workers,
            worker,
            strategy_lib.has_chief(strategy),
        )

    @property
    def replicas_per_worker(self) -> int:
        """Number of replicas of each worker."""
        return self.num_replicas // self.num_workers

    def in_order(self, workers: Sequence[int]) -> list[int]:
        """Sorts ranks of workers as TensorFlow sorts the members of a group.

        TensorFlow sorts their names, as texts, so that task 10 comes before
        task 2.

        >>> Cluster(num_replicas=12, num_workers=12).in_order([2, 9, 10])
        [10, 2, 9]
        """

        def name(worker: int) -> str:
            if self.has_chief and worker == 0:
                return "/job:chief/replica:0/task:0"
            return f"/job:worker/replica:0/task:{worker - self.has_chief}"

        return sorted(workers, key=name)


@dataclasses.dataclass(frozen=True)
class Topology(hyper_parameters.HyperParameters, abc.ABC):
    """Base class: who exchanges gradients with whom.

    A subclass is a frozen dataclass of hyper-parameters, registered with
    `keras.saving.register_keras_serializable`. One that exchanges selected
    entries is an `EntryTopology`; by any other whole gradients are summed.
    """

    def replicas_per_participant(self, cluster: Cluster) -> int:
        """Returns how many replicas act as one, with one state and payload."""
        del cluster
        return 1

    def num_participants(self, cluster: Cluster) -> int:
        """Returns N, the number of those who exchange."""
        return cluster.num_replicas // self.replicas_per_participant(cluster)

    @abc.abstractmethod
    def sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        """Returns the bytes that each participant sends per step.

        Args:
            num_bytes: Bytes of what each participant has: a payload, or a
                whole gradient.
            cluster: `Cluster`.
        """

    @abc.abstractmethod
    def worker_sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        """Returns the bytes that each worker sends to others per step."""


@dataclasses.dataclass(frozen=True)
class EntryTopology(Topology):
    """Base class: a topology by which payloads of selected entries go.

    `exchange` and `sum_within` are called in a replica context, on all
    replicas, while a `tf.function` is traced. Every participant must receive
    the same payloads, because all of them apply the sum of the entries.
    """

    # True if payloads may differ in length from participant to participant.
    can_vary_length: ClassVar[bool] = False

    def sum_within(
        self, gradients: Sequence[tf.Tensor | None], cluster: Cluster
    ) -> Sequence[tf.Tensor | None]:
        """Returns the sums of gradients over the replicas of a participant."""
        del cluster
        return gradients

    @abc.abstractmethod
    def exchange(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        cluster: Cluster,
    ) -> tf.Tensor:
        """Gives every participant the payloads of all.

        Args:
            payload: Tensor `[length]` of held words, of the same length on
                every replica, and the same on the replicas of a participant.
            num_used: Scalar int32 tensor, the number of words of this payload
                that have to be sent, the others being 0; None for all, as
                always where `can_vary_length` is False.
            cluster: `Cluster`.

        Returns:
            Tensor `[N, length]` of held words, in an order that is TensorFlow's
            and the same on every replica.
        """


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class AllReduce(Topology):
    """Whole gradients, summed over all replicas in a ring: the dense exchange.

    Example:

    >>> AllReduce().sent_bytes(1000, Cluster(num_replicas=4))
    1500.0
    """

    def sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        return exchanges.ring(num_bytes, cluster.num_replicas)

    def worker_sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        # The ring leaves each worker once.
        is_alone = cluster.num_workers == 1
        return 0 if is_alone else self.sent_bytes(num_bytes, cluster)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class AllGather(EntryTopology):
    """Every replica sends its payload to all others.

    Example:

    >>> AllGather().sent_bytes(100, Cluster(num_replicas=4))
    300
    """

    can_vary_length: ClassVar[bool] = True

    def exchange(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        cluster: Cluster,
    ) -> tf.Tensor:
        del cluster
        return collectives.all_gather(payload, num_used)

    def sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        return exchanges.to_all(num_bytes, cluster.num_replicas)

    def worker_sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        return exchanges.to_all_by_worker(
            num_bytes, cluster.num_replicas, cluster.replicas_per_worker
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Hierarchical(EntryTopology):
    """Every worker acts as one: its replicas sum their gradients beforehand.

    N is the number of workers, and each sends its payload once, however many
    replicas it has: each of them sends its share of the words.

    Example:

    >>> cluster = Cluster(num_replicas=8, num_workers=2)
    >>> Hierarchical().num_participants(cluster)
    2
    >>> Hierarchical().worker_sent_bytes(100, cluster)
    100
    """

    def replicas_per_participant(self, cluster: Cluster) -> int:
        return cluster.replicas_per_worker

    def sum_within(
        self, gradients: Sequence[tf.Tensor | None], cluster: Cluster
    ) -> Sequence[tf.Tensor | None]:
        if cluster.replicas_per_worker == 1:
            return gradients
        present = [g for g in gradients if g is not None]
        if cluster.num_workers == 1:
            sums = collectives.all_reduce_sum(present)
        else:
            sums = watchdog.watched(
                lambda: keras_internals.sum_within_worker(
                    present, cluster.worker, cluster.num_workers
                )
            )
        remaining = iter(sums)
        return [None if g is None else next(remaining) for g in gradients]

    def exchange(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        cluster: Cluster,
    ) -> tf.Tensor:
        del num_used
        if cluster.num_workers == 1:
            return payload[tf.newaxis]
        return collectives.gather_among_workers(
            payload, cluster.worker, cluster.num_workers
        )

    def sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        return exchanges.to_all(num_bytes, cluster.num_workers)

    def worker_sent_bytes(self, num_bytes: int, cluster: Cluster) -> float:
        return self.sent_bytes(num_bytes, cluster)


@dataclasses.dataclass(frozen=True)
class Participants:
    """The participants of an exchange: a topology in the scope of a strategy.

    To be created in that scope. `rank`, `sum_within` and `exchange` are for a
    replica context.

    Args:
        topology: `Topology`.
        cluster: `Cluster`.
    """

    topology: Topology = AllGather()
    cluster: Cluster = dataclasses.field(default_factory=Cluster.in_scope)

    @property
    def count(self) -> int:
        """N, the number of participants."""
        return self.topology.num_participants(self.cluster)

    @property
    def copies(self) -> int:
        """Number of replicas that share a participant's state."""
        return self.topology.replicas_per_participant(self.cluster)

    @property
    def local_ranks(self) -> range:
        """The ranks of the participants in this process."""
        num_local = self.cluster.replicas_per_worker // self.copies
        first = self.cluster.worker * num_local
        return range(first, first + num_local)

    @property
    def rank(self) -> tf.Tensor:
        """The rank of the participant that this replica belongs to."""
        rank = strategy_lib.replica_rank()
        return rank // self.copies if self.copies > 1 else rank

    def sum_within(
        self, gradients: Sequence[tf.Tensor | None]
    ) -> Sequence[tf.Tensor | None]:
        """Sums gradients over the replicas of this participant."""
        assert isinstance(self.topology, EntryTopology)
        return self.topology.sum_within(gradients, self.cluster)

    def exchange(
        self, payload: tf.Tensor, num_used: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Gives every participant the payloads of all, `[N, length]`."""
        assert isinstance(self.topology, EntryTopology)
        return self.topology.exchange(payload, num_used, self.cluster)
