r"""Payloads of entries that are summed by their owners.

    to_owner    each participant sends each owner its entries of the owner's
                share
    reduce      an owner sums them, and keeps the largest sums
    to_all      each owner sends the sums that it keeps to all

Both ways the lengths are fixed. Where there are fewer entries, fillers follow,
at positions behind the owner's share. Their values repeat those of the entries,
so that the scale of a bucket stays about the same.

TensorFlow puts the members of a collective into an order of its own: among
workers task 10 comes before task 2. So all that is sent begins with the number
of the owner, and nobody relies on the order of rows.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.codecs import payload as payload_lib
from tf_regtopk.codecs import value_codecs
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology as topology_lib
from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import hashing
from tf_regtopk.kernels import ownership as ownership_lib
from tf_regtopk.kernels import ranges
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.sizes import payload as sizes

_NOT_VALID = -1


class Kept(NamedTuple):
    """The sums that an owner keeps, beside the payload of them.

    Args:
        indices: int32 tensor `[keep]`, the entries, each once.
        error: Float tensor `[keep]`, their sums minus what all participants
            decode; 0 where a sum is not sent.
        sums: Float tensor `[keep]`, their sums; the largest sum among them.
    """

    indices: tf.Tensor
    error: tf.Tensor
    sums: tf.Tensor


class Facts(NamedTuple):
    """Numbers about the entries that owners have summed.

    Args:
        num_accepted: Float scalar, the number of entries, of all participants,
            of which the sum was kept.
        magnitudes: Float scalar, the sum of the magnitudes of these entries.
    """

    num_accepted: tf.Tensor
    magnitudes: tf.Tensor


@dataclasses.dataclass(frozen=True)
class ScatteredCodec:
    """The codecs of both ways, for one k, J and N.

    It takes the place of a `PayloadCodec` in a step.

    Args:
        ownership: `Ownership` of J entries by N owners.
        k: Number of entries that a participant selects.
        to_owner: `PayloadCodec` of the `capacity` entries for an owner.
        to_all: `PayloadCodec` of the `keep` sums of an owner.
    """

    ownership: ownership_lib.Ownership
    k: int
    to_owner: payload_lib.PayloadCodec
    to_all: payload_lib.PayloadCodec

    @classmethod
    def of(
        cls,
        codec: payload_lib.Codec,
        ownership: ownership_lib.Ownership,
        k: int,
        capacity: float,
        keep: float,
        dtype: tf.DType = tf.float32,
    ) -> "ScatteredCodec":
        """Makes the codecs of both ways.

        Args:
            codec: `Codec`.
            ownership: `Ownership`.
            k: Number of entries that a participant selects.
            capacity: The most entries from a participant to an owner, in units
                of k / N.
            keep: The most sums that an owner keeps, in units of k / N.
            dtype: Float dtype of the values.

        Raises:
            ValueError: If there are too many entries for int32.
        """
        share, n = ownership.share, ownership.num_owners
        if n * (share + 1) >= 2**31:
            raise ValueError(
                "`topology` must be another one than `ReduceScatter` for so "
                "many entries, because positions behind the last must be "
                f"int32. Received: {ownership.size} entries"
            )
        numbers = sizes.Scattered.of(ownership.size, n, k, capacity, keep)
        return cls(
            ownership,
            k,
            codec.payload(numbers.to_owner, numbers.size_to_owner, dtype),
            codec.payload(numbers.to_all, numbers.size_to_all, dtype),
        )

    @property
    def size(self) -> int:
        """J, the number of entries of the gradient."""
        return self.ownership.size

    @property
    def num_words(self) -> int:
        """Number of words of the payloads for all owners."""
        return self.ownership.num_owners * self.num_words_to_owner

    @property
    def num_words_to_owner(self) -> int:
        """Number of words that a participant sends to an owner."""
        return sizes.NUM_TO_OWNER + self.to_owner.num_words

    @property
    def is_variable(self) -> bool:
        """False, because all lengths are fixed."""
        return False

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the values."""
        return self.to_owner.dtype

    def encode(
        self, indices: tf.Tensor, values: tf.Tensor, stream: value_codecs.Stream
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Packs entries into a payload for each owner.

        Of more entries than an owner takes from one participant some are left
        out, in each step others.

        Args:
            indices: int32 tensor `[k]`, rising.
            values: Float tensor `[k]`.
            stream: `(step, rank)`, scalar integers.

        Returns:
            `(payloads, sent)`: an int32 tensor `[num_words]`, the payloads
            for all owners in turn, and the values that the owners decode,
            `[k]`, 0 for what is left out.
        """
        step, rank = stream
        n, capacity = self.ownership.num_owners, self.to_owner.k
        owners, positions = self.ownership.of(indices)
        places, counts = ownership_lib.grouped(owners, n)
        # Of too many entries a run is sent that starts anywhere, and goes on
        # with the first after the last. `number` counts the run in the order of
        # the entries, because positions must rise.
        number = ranges.range_from(ranges.opaque_zero(indices[0]), capacity)
        start = self._start(step, rank) % tf.maximum(counts, 1)
        start = tf.where(counts > capacity, start, 0)[:, tf.newaxis]
        counts_of = counts[:, tf.newaxis]
        num_wrapped = tf.maximum(start + capacity - counts_of, 0)
        num_wrapped = tf.where(counts_of > capacity, num_wrapped, capacity)
        number += tf.where(number >= num_wrapped, start - num_wrapped, 0)
        is_used = number < counts_of
        number %= tf.maximum(counts_of, 1)
        starts = bitmap.cumulative_sum(counts) - counts
        place = tf.gather(
            places, tf.minimum(starts[:, tf.newaxis] + number, self.k - 1)
        )
        payloads, decoded = tf.map_fn(
            lambda row: self.to_owner.encode(
                row[0], row[1], (step, self._stream(rank * n + row[2]))
            ),
            (
                self._with_fillers(tf.gather(positions, place), is_used),
                tf.where(counts_of > 0, tf.gather(values, place), 0.0),
                ranges.range_from(ranges.opaque_zero(rank), n),
            ),
            fn_output_signature=(
                tf.TensorSpec([self.to_owner.num_words], tf.int32),
                tf.TensorSpec([capacity], self.dtype),
            ),
        )
        # Fillers are added up behind the k values.
        target = tf.where(is_used, place, self.k)[..., tf.newaxis]
        sent = tf.scatter_nd(target, decoded, [self.k + 1])[: self.k]
        numbers = ranges.range_from(ranges.opaque_zero(rank), n)
        payloads = tf.concat([numbers[:, tf.newaxis], payloads], axis=1)
        return tf.reshape(payloads, [-1]), sent

    def reduce(
        self, payloads: tf.Tensor, step: int | tf.Tensor
    ) -> tuple[tf.Tensor, Kept]:
        """Sums the entries of an owner, and packs the largest sums.

        Args:
            payloads: int32 tensor `[N, num_words_to_owner]`, what the
                participants have sent to this owner, in any order.
            step: Scalar integer.

        Returns:
            `(payload, kept)`: an int32 tensor `[num_words_to_all]`, and `Kept`.
        """
        n, share = self.ownership.num_owners, self.ownership.share
        owner = tf.clip_by_value(payloads[0, 0], 0, n - 1)
        positions, values, is_valid = self.to_owner.decode(
            payloads[:, sizes.NUM_TO_OWNER :]
        )
        is_valid &= payloads[:, 0] == owner
        sums = scatter_sum.sum_entries(
            positions, values, share + self.to_owner.k
        )[:share]
        words, kept, is_kept = self._keep(sums, owner, step)
        # Fillers are behind the share, where nothing is kept.
        is_accepted = tf.gather(is_kept, tf.minimum(positions, share))
        num_accepted = tf.reduce_sum(tf.cast(is_accepted, tf.int32))
        magnitudes = tf.reduce_sum(tf.where(is_accepted, tf.abs(values), 0.0))
        facts = tf.stack(
            [
                owner,
                tf.where(tf.reduce_all(is_valid), num_accepted, _NOT_VALID),
                tf.bitcast(tf.cast(magnitudes, tf.float32), tf.int32),
            ]
        )
        return tf.concat([facts, words], axis=0), kept

    def _keep(
        self, sums: tf.Tensor, owner: tf.Tensor, step: int | tf.Tensor
    ) -> tuple[tf.Tensor, Kept, tf.Tensor]:
        """Packs the largest sums of an owner.

        Returns:
            `(words, kept, is_kept)`: int32 words, `Kept`, and a bool tensor
            `[share + 1]`, False at its end.
        """
        share, number = self.ownership.share, self.to_all.k
        largest = selection.select_largest(
            sums, [selection.Group(share, number)], step
        )
        sums_kept = selection.take(sums, largest)
        # Sums that are 0 are as good as not kept, and make room for fillers.
        order, counts = ownership_lib.grouped(
            tf.cast(sums_kept == 0, tf.int32), 2
        )
        num_used = counts[0]
        place = ranges.range_from(ranges.opaque_zero(num_used), number)
        is_used = place < num_used
        kept = tf.gather(largest, order)
        sums_kept = tf.gather(
            sums_kept, tf.gather(order, place % tf.maximum(num_used, 1))
        )
        n = self.ownership.num_owners
        words, decoded = self.to_all.encode(
            self._with_fillers(kept, is_used),
            sums_kept,
            (step, self._stream(n * n + owner)),
        )
        is_sent = is_used & (decoded != 0)
        counts = tf.scatter_nd(
            tf.where(is_used, kept, share)[:, tf.newaxis],
            tf.cast(is_sent, tf.int32),
            [share + 1],
        )
        # Entries behind the last are fillers. They stay different from the
        # others, because the last entry then is another owner's.
        indices = tf.minimum(
            self.ownership.entries(owner, kept), self.ownership.size - 1
        )
        error = tf.where(is_sent, sums_kept - decoded, 0.0)
        return words, Kept(indices, error, sums_kept), counts > 0

    @property
    def num_words_to_all(self) -> int:
        """Number of words that an owner sends to each participant."""
        return sizes.NUM_FACTS + self.to_all.num_words

    def decode(
        self, payloads: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Unpacks the sums of all owners, from payloads of any contents.

        Args:
            payloads: int32 tensor `[N, num_words_to_all]`, in any order.

        Returns:
            `(indices, values, is_valid)`, as of `PayloadCodec.decode`, tensors
            `[N, keep]`, `[N, keep]` and `[N]`; but fillers have the value 0 and
            the index 0.
        """
        positions, values, is_valid = self.to_all.decode(
            payloads[:, sizes.NUM_FACTS :]
        )
        n = self.ownership.num_owners
        owners = tf.clip_by_value(payloads[:, 0], 0, n - 1)
        counts = tf.scatter_nd(owners[:, tf.newaxis], tf.ones_like(owners), [n])
        is_each_there = tf.reduce_all(counts == 1)
        is_valid &= (payloads[:, 0] == owners) & is_each_there
        indices = self.ownership.entries(owners[:, tf.newaxis], positions)
        is_entry = (positions < self.ownership.share) & (
            indices < self.ownership.size
        )
        return (
            tf.where(is_entry, indices, 0),
            tf.where(is_entry, values, 0.0),
            is_valid & (payloads[:, 1] != _NOT_VALID),
        )

    def facts(self, payloads: tf.Tensor) -> Facts:
        """The `Facts` of payloads `[N, num_words_to_all]` or their front."""
        return Facts(
            tf.reduce_sum(tf.cast(payloads[:, 1], tf.float32)),
            tf.reduce_sum(tf.bitcast(payloads[:, 2], tf.float32)),
        )

    def _stream(self, number: tf.Tensor) -> tf.Tensor:
        """The number by which stochastic rounding differs from any other's.

        Behind those of the replicas and of `CompressedDownlink`.
        """
        return number + self.ownership.num_owners + 1

    def _start(self, step: tf.Tensor, rank: tf.Tensor) -> tf.Tensor:
        """Non-negative int32 numbers `[N]` that look random."""
        hashes = hashing.hash_bits(self.ownership.num_owners, 0, step, rank)
        bits = tf.bitwise.right_shift(hashes, tf.constant(9, tf.uint32))
        return tf.bitcast(bits, tf.int32)

    def _with_fillers(
        self, positions: tf.Tensor, is_used: tf.Tensor
    ) -> tf.Tensor:
        """Positions, rising behind the share where they are not used."""
        number = ranges.range_from(
            ranges.opaque_zero(tf.reshape(positions, [-1])[0]),
            positions.shape[-1],
        )
        return tf.where(is_used, positions, self.ownership.share + number)


def payload_codec(
    codec: payload_lib.Codec,
    k: int,
    size: int,
    dtype: tf.DType,
    topology: topology_lib.Topology,
    num_participants: int,
) -> payload_lib.PayloadCodec | ScatteredCodec:
    """Makes the codec of the payloads by which a topology exchanges entries.

    Args:
        codec: `Codec`.
        k: Number of entries that a participant selects.
        size: J, the number of entries of the gradient.
        dtype: Float dtype of the values.
        topology: `Topology`.
        num_participants: N.

    Returns:
        `ScatteredCodec` for a `ReduceScatter` of several participants, else
        `PayloadCodec`.

    Example:

    >>> made = payload_codec(
    ...     payload_lib.Codec(), k=10, size=1000, dtype=tf.float32,
    ...     topology=reduce_scatter.ReduceScatter(), num_participants=4)
    >>> type(made).__name__, made.ownership.num_owners
    ('ScatteredCodec', 4)
    """
    if num_participants == 1 or not isinstance(
        topology, reduce_scatter.ReduceScatter
    ):
        return codec.payload(k, size, dtype)
    return ScatteredCodec.of(
        codec,
        ownership_lib.Ownership(size, num_participants),
        k,
        topology.capacity,
        topology.keep,
        dtype,
    )
