"""Reduce-scatter of entries: each entry is summed by one owner."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import topology
from tf_regtopk.sizes import exchanges


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class ReduceScatter(topology.EntryTopology):
    r"""Entries go to their owners, which send the largest sums to all.

    Each of the N participants owns J / N entries, spread over the whole
    gradient. It sends every owner the selected entries of the owner's share, at
    most `capacity k / N`. An owner sums what it receives, and sends the
    `keep k / N` largest sums to all. So each participant sends and receives
    about

        capacity k + keep k entries,    by an all-gather  (N - 1) k

    whatever N is, in two rounds. Nothing is lost: entries for which there was
    no room at the sender or at the owner stay in the sender's residual error,
    and what the codec rounds off the kept sums in the residual of their owner.

    If the participants' data differ, most of what one selects is its own bias,
    of which owners that keep only the largest sums send little. With few
    participants an all-gather of the same bytes is more accurate. The larger
    `keep`, the smaller the difference.

    Between workers a participant sends to each owner by an all-to-all. Replicas
    of one process gather all of it, which saves nothing: there this is to try.

    With `hierarchical` the replicas of each worker sum their gradients
    beforehand, as by `Hierarchical`: the workers are the participants, and each
    sends what goes to an owner once, however many replicas it has.

    Args:
        capacity: Float of at least 1: the most entries from one participant to
            one owner, in units of k / N, rounded up.
        keep: Positive float: the most sums that an owner keeps, in units of
            k / N, rounded up. `keep = capacity * N` keeps all sums, but for
            what `capacity` was rounded up; `keep = N * N` keeps all of them.
        hierarchical: Boolean, by its name only. Whether every worker acts as
            one.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> cluster = topology.Cluster(num_replicas=4)
    >>> ReduceScatter(capacity=1.5, keep=1.0).sent_bytes(100, cluster)
    75.0
    >>> cluster = topology.Cluster(num_replicas=8, num_workers=2)
    >>> ReduceScatter(hierarchical=True).worker_sent_bytes(100, cluster)
    50.0

    A relative of Ok-Topk (Li, Hoefler, 2022) and of SparDL (Zhao et al., 2023),
    which balance and merge in other ways.
    """

    capacity: float = 1.5
    keep: float = 1.0
    hierarchical: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        validation.check_number(
            "capacity",
            self.capacity,
            "at least 1, because a participant selects k / N entries of each "
            "owner on average",
            lambda c: c >= 1,
        )
        validation.check_number(
            "keep", self.keep, "positive", lambda share: share > 0
        )
        validation.check_boolean("hierarchical", self.hierarchical)

    @property
    def gathering(self) -> topology.EntryTopology:
        """The topology by which its participants would send all to all."""
        if self.hierarchical:
            return topology.Hierarchical()
        return topology.AllGather()

    def replicas_per_participant(self, cluster: topology.Cluster) -> int:
        return self.gathering.replicas_per_participant(cluster)

    def sum_within(
        self,
        gradients: Sequence[tf.Tensor | None],
        cluster: topology.Cluster,
    ) -> Sequence[tf.Tensor | None]:
        return self.gathering.sum_within(gradients, cluster)

    def scatter(
        self, payloads: tf.Tensor, cluster: topology.Cluster
    ) -> tf.Tensor:
        """Gives every participant what all others have for it.

        Args:
            payloads: Tensor `[N, length]` of held words, a row for each owner.
            cluster: `Cluster`.

        Returns:
            Tensor `[N, length]` of held words, a row from each participant.
        """
        if self.hierarchical:
            return collectives.all_to_all_among_workers(
                payloads, cluster.worker, cluster.num_workers
            )
        return collectives.all_to_all(payloads)

    def exchange(
        self,
        payload: tf.Tensor,
        num_used: tf.Tensor | None,
        cluster: topology.Cluster,
    ) -> tf.Tensor:
        del num_used  # All lengths are fixed.
        return self.gathering.exchange(payload, None, cluster)

    def sent_bytes(self, num_bytes: int, cluster: topology.Cluster) -> float:
        return exchanges.to_owners(num_bytes, self.num_participants(cluster))

    def worker_sent_bytes(
        self, num_bytes: int, cluster: topology.Cluster
    ) -> float:
        n = self.num_participants(cluster)
        return exchanges.to_owners_by_worker(
            num_bytes, n, n // cluster.num_workers
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Without it, files are as those of versions that do not know it.
        if not self.hierarchical:
            del config["hierarchical"]
        return config
