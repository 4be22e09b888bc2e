r"""How the indices of k of J entries are written.

There are C(J, k) sets, so no code for all of them needs fewer than
`log2 C(J, k)` bits in the worst case or, if all are alike, on average. Each
code here is a pair of pure functions on 32-bit words. Their length is fixed by
k and J, except that of `Golomb`.

What is decoded may have come from anywhere: `decode` returns something for any
words, and says whether there were exactly k indices in them. Whether these rise
and lie in the gradient is for the caller to check.
"""

import abc
import dataclasses
import math

import tensorflow as tf

from tf_regtopk.codecs import bit_packing
from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import ranges

_WORD = bitmap.WORD


def entropy_bits(k, size):
    """`log2 C(J, k)`, the bits that k indices of J = `size` need.

    Example:

    >>> round(entropy_bits(k=10, size=1000) / 10, 2)
    7.78
    """
    log_factorials = (
        math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
    )
    return log_factorials / math.log(2)


@dataclasses.dataclass(frozen=True)
class IndexCodec(abc.ABC):
    """Base class: rising indices of k entries as words, and back.

    Args:
        k: Number of indices, at least 1.
        size: J, the number of entries of the gradient.
    """

    k: int
    size: int

    # Whether `encode` may use fewer words than `num_words`.
    is_variable = False

    @property
    @abc.abstractmethod
    def num_words(self):
        """Most words that any k indices take."""

    @abc.abstractmethod
    def encode(self, indices):
        """Writes indices.

        Args:
            indices: int32 tensor `[k]`, rising, each in [0, J).

        Returns:
            uint32 tensor `[num_words]`. Where the length varies, words past
            `num_used` of it are 0.
        """

    @abc.abstractmethod
    def decode(self, words):
        """Reads indices, from any words.

        Args:
            words: uint32 tensor `[num_words]`.

        Returns:
            `(indices, is_valid)`: an int32 tensor `[k]` and a scalar bool.
        """

    def decode_all(self, words):
        """As `decode` of each of N payloads, in few but larger operations.

        For GPUs, where to start an operation may take longer than to run it.

        Args:
            words: uint32 tensor `[N, num_words]`.

        Returns:
            `(indices, is_valid)`: an int32 tensor `[N, k]` and a bool one
            `[N]`. Where one payload is not valid, others that are may decode to
            other indices.
        """
        # XLA joins what is computed number by number.
        indices, is_valid = zip(
            *map(self.decode, tf.unstack(words)), strict=True
        )
        return tf.stack(indices), tf.stack(is_valid)

    def num_used(self, words):
        """How many of the words `encode` has used, a scalar int32 tensor."""
        del words
        return tf.constant(self.num_words)


class Every(IndexCodec):
    """Nothing is written: with k = J there is but one set."""

    @property
    def num_words(self):
        return 0

    def encode(self, indices):
        del indices
        return tf.zeros([0], tf.uint32)

    def decode(self, words):
        del words
        return ranges.range_from(tf.constant(0), self.size), tf.constant(True)


class Int32(IndexCodec):
    """Each index as it is, in 32 bits."""

    @property
    def num_words(self):
        return self.k

    def encode(self, indices):
        return tf.bitcast(indices, tf.uint32)

    def decode(self, words):
        return tf.bitcast(words, tf.int32), tf.constant(True)


class Bitmap(IndexCodec):
    """One bit for each of the J entries."""

    @property
    def num_words(self):
        return -(-self.size // _WORD)

    def encode(self, indices):
        return bitmap.of_positions(indices, self.num_words)

    def decode(self, words):
        return _positions_of_bits(words, self.k)

    def decode_all(self, words):
        return _positions_in_rows(words, self.k)


class EliasFano(IndexCodec):
    r"""The low bits of each index as they are, the high ones in unary.

        low_i  = j_i mod 2^l              l = floor(log2(J / k))
        bit number floor(j_i / 2^l) + i of the rest is 1, others are 0

    Takes `k (2 + l)` to `k (3 + l)` bits whatever the indices are, at most 12 %
    more than the bound at densities up to 10 %.

    Source: Elias, "Efficient Storage and Retrieval by Content and Address of
    Static Files" (1974).
    """

    @property
    def num_words(self):
        return (
            bit_packing.num_words(self.k, self._num_low) + self._num_high_words
        )

    @property
    def _num_low(self):
        return max(0, (self.size // self.k).bit_length() - 1)

    @property
    def _num_high_words(self):
        high_bits = self.k + ((self.size - 1) >> self._num_low)
        return -(-high_bits // _WORD)

    def encode(self, indices):
        high = tf.bitwise.right_shift(indices, self._num_low)
        unary = high + ranges.range_from(ranges.opaque_zero(indices[0]), self.k)
        return tf.concat(
            [
                _pack_low(indices, self._num_low),
                bitmap.of_positions(unary, self._num_high_words),
            ],
            axis=0,
        )

    def decode(self, words):
        low, words = _split_low(words, self.k, self._num_low)
        unary, is_valid = _positions_of_bits(words, self.k)
        high = unary - ranges.range_from(ranges.opaque_zero(unary[0]), self.k)
        return tf.bitwise.left_shift(high, self._num_low) | low, is_valid

    def decode_all(self, words):
        low, words = zip(
            *(
                _split_low(row, self.k, self._num_low)
                for row in tf.unstack(words)
            ),
            strict=True,
        )
        unary, is_valid = _positions_in_rows(tf.stack(words), self.k)
        high = unary - ranges.range_from(
            ranges.opaque_zero(unary[0, 0]), self.k
        )
        high = tf.bitwise.left_shift(high, self._num_low)
        return high | tf.stack(low), is_valid


class Golomb(IndexCodec):
    r"""The gap before each index: low bits as they are, the rest in unary.

        gap_i = j_i - j_{i-1} - 1         j_{-1} = -1
        low_i = gap_i mod 2^l, then floor(gap_i / 2^l) zeros and a one

    with the l that is best for indices spread evenly, on which it takes at most
    2 % more than the bound at densities up to 10 %. Its length changes with the
    indices.

    Sources: Golomb, "Run-length Encodings" (1966), in the form of Rice (1971);
    Sattler et al., "Robust and Communication-Efficient Federated Learning from
    Non-IID Data" (STC, 2019).
    """

    is_variable = True

    @property
    def num_words(self):
        return self._num_low_words - (-self._most_unary_bits // _WORD)

    @property
    def _most_unary_bits(self):
        return self.k + ((self.size - self.k) >> self._num_low)

    @property
    def _num_low(self):
        none_before = 1 - self.k / self.size

        def mean_bits(low):
            return low + 1 / (1 - none_before ** (1 << low))

        return min(range(31), key=mean_bits)

    @property
    def _num_low_words(self):
        return bit_packing.num_words(self.k, self._num_low)

    def encode(self, indices):
        gaps = indices - tf.concat([[-1], indices[:-1]], axis=0) - 1
        zeros = bitmap.cumulative_sum(
            tf.bitwise.right_shift(gaps, self._num_low)
        )
        unary = zeros + ranges.range_from(
            ranges.opaque_zero(indices[0]), self.k
        )
        return tf.concat(
            [
                _pack_low(gaps, self._num_low),
                bitmap.of_positions(
                    unary, self.num_words - self._num_low_words
                ),
            ],
            axis=0,
        )

    def decode(self, words):
        low, words = _split_low(words, self.k, self._num_low)
        unary, is_valid = _positions_of_bits(words, self.k)
        # The sums of all gaps so far, of which `unary` holds the high parts.
        i = ranges.range_from(ranges.opaque_zero(unary[0]), self.k)
        high = tf.bitwise.left_shift(unary - i, self._num_low)
        return high + bitmap.cumulative_sum(low) + i, is_valid

    def num_used(self, words):
        # Up to the word of the last one.
        used = tf.cast(words[self._num_low_words :] != 0, tf.int32)
        number = 1 + ranges.range_from(
            ranges.opaque_zero(used[0]), used.shape[0]
        )
        return self._num_low_words + tf.reduce_max(used * number)


CODECS = {
    "int32": Int32,
    "elias_fano": EliasFano,
    "golomb": Golomb,
    "bitmap": Bitmap,
}


def choose(name, k, size):
    """The code of this name for k of J = `size` entries.

    Args:
        name: A key of `CODECS`, or `"auto"`: the shortest of those whose length
            is fixed.
        k: Number of indices.
        size: J.

    Returns:
        `IndexCodec`.

    Example:

    >>> choose("auto", k=10, size=1000)
    EliasFano(k=10, size=1000)
    """
    if k == size:
        return Every(k, size)
    if name == "elias_fano" and size + k >= 2**31 and 2 * k > size:
        raise ValueError(
            "`indices` must be another code for so many entries, as "
            '"elias_fano" numbers its bits by int32. Received: indices='
            f'"elias_fano", k={k}, size={size}'
        )
    if name != "auto":
        return CODECS[name](k, size)
    codecs = [codec(k, size) for codec in CODECS.values()]
    return min(
        (codec for codec in codecs if not codec.is_variable),
        key=lambda codec: codec.num_words,
    )


def _positions_of_bits(words, k):
    """Positions of the first k set bits, and whether there are exactly k."""
    num_set = tf.reduce_sum(bitmap.count_bits(words))
    return bitmap.positions(words, k), tf.equal(num_set, k)


def _positions_in_rows(words, k):
    """As `_positions_of_bits`, for each row of words."""
    num_rows, num_words = words.shape
    num_set = tf.reduce_sum(bitmap.count_bits(words), axis=1)
    positions = tf.reshape(
        bitmap.positions(tf.reshape(words, [-1]), num_rows * k), [num_rows, k]
    )
    before = tf.range(num_rows)[:, tf.newaxis] * (num_words * _WORD)
    return positions - before, tf.equal(num_set, k)


def _pack_low(numbers, num_low):
    low = numbers & ((1 << num_low) - 1)
    return bit_packing.pack(tf.bitcast(low, tf.uint32), num_low)


def _split_low(words, k, num_low):
    """The k low parts in front of `words`, and the other words."""
    num_words = bit_packing.num_words(k, num_low)
    low = bit_packing.unpack(words[:num_words], k, num_low)
    return tf.bitcast(low, tf.int32), words[num_words:]
