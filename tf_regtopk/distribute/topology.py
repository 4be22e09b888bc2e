"""The topology: who exchanges entries with whom."""

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.distribute import watchdog


class Participants:
    """Who exchanges entries: every replica, or every worker as a whole.

    To be created in the scope of the strategy. The methods and `number` are for
    a replica context.

    Args:
        are_workers: Boolean. If true, the replicas of a worker first sum their
            gradients, and from then on all do the same; each sends its share of
            what the worker has to send.
    """

    def __init__(self, are_workers=False):
        strategy = tf.distribute.get_strategy()
        self._worker, num_workers = strategy_lib.worker_number(strategy)
        num_replicas = strategy.num_replicas_in_sync
        self._replicas_per_worker = num_replicas // num_workers
        self._are_groups = are_workers and self._replicas_per_worker > 1
        self.count = num_workers if are_workers else num_replicas

    @property
    def local(self):
        """The numbers of those in this process."""
        if self._are_groups:
            return range(self._worker, self._worker + 1)
        first = self._worker * self._replicas_per_worker
        return range(first, first + self._replicas_per_worker)

    @property
    def copies(self):
        """How many replicas share a participant's state."""
        return self._replicas_per_worker if self._are_groups else 1

    @property
    def number(self):
        """The number of the participant that this replica belongs to."""
        if self._are_groups:
            return tf.constant(self._worker)
        replica = tf.distribute.get_replica_context()
        return tf.convert_to_tensor(replica.replica_id_in_sync_group)

    def sum_within(self, gradients):
        """Sums gradients over the replicas of this participant.

        Args:
            gradients: List of tensors or None.

        Returns:
            List of the same structure.
        """
        if not self._are_groups:
            return gradients
        present = [g for g in gradients if g is not None]
        if self.count == 1:
            sums = iter(collectives.all_reduce_sum(present))
        else:
            sums = iter(
                watchdog.watched(
                    lambda: keras_internals.sum_within_worker(
                        present, self._worker, self.count
                    )
                )
            )
        return [None if g is None else next(sums) for g in gradients]

    def all_gather(self, payload, num_used=None):
        """As the function `all_gather`, among the participants."""
        if not self._are_groups:
            return collectives.all_gather(payload, num_used)
        if self.count == 1:
            return payload[tf.newaxis]
        length = payload.shape[0]
        share = -(-length // self._replicas_per_worker)
        padding = share * self._replicas_per_worker - length
        shares = tf.reshape(tf.pad(payload, [[0, padding]]), [-1, share])
        gathered = watchdog.watched(
            lambda: keras_internals.gather_among_workers(
                shares, self._worker, self.count
            )
        )
        return tf.reshape(gathered, [self.count, -1])[:, :length]
