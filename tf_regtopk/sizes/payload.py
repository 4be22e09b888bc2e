"""Numbers of words of payloads, also of those to and from owners."""

import bisect
import math
from typing import NamedTuple

from tf_regtopk.sizes import indices as index_sizes
from tf_regtopk.sizes import values as value_sizes

# Words in front of the entries for an owner: its number.
NUM_TO_OWNER = 1
# Words in front of the sums of an owner: its number, and `scattered.Facts`.
NUM_FACTS = 3


def num_words(
    indices: str, values: value_sizes.ValueCodecName, k: int, size: int
) -> int:
    """Number of words of k of J = `size` float32 entries, without a header.

    Args:
        indices: Name of an index codec of fixed length, or `"auto"`.
        values: Name of the value codec.
        k: Number of entries.
        size: J.

    Returns:
        Number of words.

    Example:

    >>> num_words("auto", "bfloat16", k=10, size=1000)
    9
    """
    index_words = index_sizes.num_words(indices, k, size)
    return value_sizes.CODES[values](k) + index_words


def density_at(
    compression: float, indices: str, values: value_sizes.ValueCodecName
) -> float:
    """The density at which a payload is so many times smaller than a gradient.

    Args:
        compression: The bytes of a float32 gradient, divided by those of a
            payload.
        indices: Name of an index codec, as of `num_words`.
        values: Name of the value codec.

    Returns:
        Float with three digits. It hardly depends on the size of the gradient,
        of which a large one is taken.

    Example:

    >>> density_at(300, "auto", "sign")
    0.0113
    """
    size = 1 << 24
    most_words = size / compression
    k = bisect.bisect(
        range(1, size),
        most_words,
        key=lambda k: num_words(indices, values, k, size),
    )
    return float(f"{max(k, 1) / size:.3g}")


class Scattered(NamedTuple):
    """The entries that are summed by owners, in numbers.

    Args:
        share: Number of positions of each owner.
        to_owner: The most entries from a participant to an owner.
        to_all: The most sums that an owner keeps.

    Example:

    >>> Scattered.of(size=1000, num_owners=4, k=20, capacity=1.5, keep=1.0)
    Scattered(share=250, to_owner=8, to_all=5)
    """

    share: int
    to_owner: int
    to_all: int

    @classmethod
    def of(
        cls, size: int, num_owners: int, k: int, capacity: float, keep: float
    ) -> "Scattered":
        """Computes the numbers of J = `size` entries.

        Args:
            size: J.
            num_owners: N.
            k: Number of entries that a participant selects.
            capacity: The most entries from a participant to an owner, in units
                of k / N.
            keep: The most sums that an owner keeps, in units of k / N.
        """
        n, share = num_owners, share_of(size, num_owners)
        to_owner = min(math.ceil(min(capacity, n) * k / n), share, k)
        most = n * to_owner
        to_all = min(math.ceil(min(keep * k / n, most)), share, most)
        return cls(share, to_owner, to_all)

    @property
    def size_to_owner(self) -> int:
        """Number of positions of entries: for each filler one is added."""
        return self.share + self.to_owner

    @property
    def size_to_all(self) -> int:
        """Number of positions of sums: for each filler one is added."""
        return self.share + self.to_all

    def num_words_to_owner(self, values: value_sizes.ValueCodecName) -> int:
        """Number of words that a participant sends to an owner."""
        return NUM_TO_OWNER + num_words(
            "auto", values, self.to_owner, self.size_to_owner
        )

    def num_words_to_all(self, values: value_sizes.ValueCodecName) -> int:
        """Number of words that an owner sends to each participant."""
        return NUM_FACTS + num_words(
            "auto", values, self.to_all, self.size_to_all
        )


def share_of(size: int, num_owners: int) -> int:
    """Number of positions of each of N owners of J entries, `ceil(J / N)`."""
    return -(-size // num_owners)
