"""The owner of each entry, where entries are summed by one participant each."""

from typing import NamedTuple

import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import hashing
from tf_regtopk.kernels import ranges
from tf_regtopk.sizes import payload as sizes


class Ownership(NamedTuple):
    r"""A share of J entries for each of N owners, all of one size.

        position_j = floor(j / N),      owner_j = (j + hash(position_j)) mod N

    Of N consecutive entries each owner has one, at the same position of its
    share. The hash spreads the entries that a model puts at equal distances,
    such as the weights of one output, over all owners.

    Args:
        size: J.
        num_owners: N.

    Example:

    >>> ownership = Ownership(size=6, num_owners=3)
    >>> owners, positions = ownership.of(tf.range(6))
    >>> owners.numpy().tolist(), positions.numpy().tolist()
    ([0, 1, 2, 2, 0, 1], [0, 0, 0, 1, 1, 1])
    >>> ownership.entries(2, tf.constant([0, 1])).numpy().tolist()
    [2, 3]
    """

    size: int
    num_owners: int

    @property
    def share(self) -> int:
        """Number of positions of each owner, `ceil(J / N)`."""
        return sizes.share_of(self.size, self.num_owners)

    def of(self, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The owners of entries, and their positions there.

        Args:
            indices: int32 tensor of any shape, each in [0, J).

        Returns:
            `(owners, positions)`: int32 tensors of that shape.
        """
        positions = indices // self.num_owners
        place = indices - positions * self.num_owners
        return self._wrap(place + self._shift(positions)), positions

    def entries(
        self, owner: int | tf.Tensor, positions: tf.Tensor
    ) -> tf.Tensor:
        """The entries at positions of an owner's share; inverts `of`.

        Args:
            owner: Integers in [0, N), of a shape that fits `positions`.
            positions: int32 tensor of any shape, each in [0, ceil(J / N)).

        Returns:
            int32 tensor. At the last position it may be J or more.
        """
        place = self._wrap(owner - self._shift(positions) + self.num_owners)
        return positions * self.num_owners + place

    def _shift(self, positions: tf.Tensor) -> tf.Tensor:
        """`hash(position) mod N`."""
        # 23 bits are positive in int32, whose remainders devices compute.
        hashes = hashing.mix_bits(tf.bitcast(positions, tf.uint32))
        bits = tf.bitwise.right_shift(hashes, tf.constant(9, tf.uint32))
        return tf.bitcast(bits, tf.int32) % self.num_owners

    def _wrap(self, number: tf.Tensor) -> tf.Tensor:
        """A number in [0, 2 N) modulo N."""
        return tf.where(
            number >= self.num_owners, number - self.num_owners, number
        )


def grouped(owners: tf.Tensor, num_owners: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The places of entries, one owner's after the other's.

    By one stable partition for each bit of the owners, because XLA's sort takes
    2 to 10 times as long on a CPU.

    Args:
        owners: int32 tensor `[k]`, each in [0, N).
        num_owners: N.

    Returns:
        `(places, counts)`: int32 tensors `[k]`, a permutation, rising among the
        places of one owner; and `[N]`, the number of places of each owner.

    Example:

    >>> places, counts = grouped(tf.constant([1, 0, 1, 2]), num_owners=4)
    >>> places.numpy().tolist(), counts.numpy().tolist()
    ([1, 0, 2, 3], [1, 2, 1, 0])
    """
    k = owners.shape[0]
    number = ranges.range_from(ranges.opaque_zero(owners[0]), k)
    places, remaining = number, owners
    for _ in range((num_owners - 1).bit_length()):
        bit = tf.bitwise.bitwise_and(remaining, 1)
        ones = bitmap.cumulative_sum(bit, largest=1)
        target = tf.where(bit == 1, k - ones[-1] + ones - 1, number - ones)
        target = target[:, tf.newaxis]
        places = tf.scatter_nd(target, places, [k])
        remaining = tf.scatter_nd(
            target, tf.bitwise.right_shift(remaining, 1), [k]
        )
    counts = tf.scatter_nd(
        owners[:, tf.newaxis], tf.ones_like(owners), [num_owners]
    )
    return places, counts
