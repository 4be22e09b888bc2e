r"""Index codecs: the indices of k of J entries as words, and back.

There are C(J, k) sets of indices, so an index codec for all sets needs at least
`log2 C(J, k)` bits in the worst case or, if all sets are equally likely, on
average. Each index codec here is a pair of pure functions on 32-bit words. The
number of words is fixed by k and J, except with `Golomb`.

The words to decode may have come from anywhere: `decode` returns something for
any words, and a flag that tells whether they held exactly k indices. The caller
checks that the indices rise and lie in the gradient.
"""

import abc
import dataclasses
import math
from typing import ClassVar
from typing import Literal

import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk.codecs import bit_packing
from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import ranges
from tf_regtopk.sizes import indices as sizes
from tf_regtopk.sizes import packing

IndexCodecName = Literal["auto", "int32", "elias_fano", "golomb", "bitmap"]
_WORD = bitmap.WORD


def entropy_bits(k: int, size: int) -> float:
    """Computes `log2 C(J, k)`, the bits that k indices of J = `size` need.

    Example:

    >>> round(entropy_bits(k=10, size=1000) / 10, 2)
    7.78
    """
    log_factorials = (
        math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
    )
    return log_factorials / math.log(2)


@dataclasses.dataclass(frozen=True)
class IndexCodec(hyper_parameters.HyperParameters, abc.ABC):
    """Base class of index codecs: rising indices of k entries as words.

    A subclass has no parameters of its own, because `Codec` takes the class. It
    must be registered with `keras.saving.register_keras_serializable`.

    Args:
        k: Number of indices, at least 1.
        size: J, the number of entries of the gradient.
    """

    k: int
    size: int

    # True if `encode` may use fewer words than `num_words`.
    is_variable: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def num_words(self) -> int:
        """Number of words that k indices occupy at most."""

    @abc.abstractmethod
    def encode(self, indices: tf.Tensor) -> tf.Tensor:
        """Writes indices.

        Args:
            indices: int32 tensor `[k]`, rising, each in [0, J).

        Returns:
            uint32 tensor `[num_words]`. If the length varies, the words past
            `num_used` are 0.
        """

    @abc.abstractmethod
    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads indices, from any words.

        Args:
            words: uint32 tensor `[num_words]`.

        Returns:
            `(indices, is_valid)`: an int32 tensor `[k]`, and a scalar bool
            tensor that tells whether the words held exactly k indices.
        """

    def decode_all(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Decodes each of N payloads, in few but larger operations.

        This serves GPUs, because starting an operation there may take longer
        than running it.

        Args:
            words: uint32 tensor `[N, num_words]`.

        Returns:
            `(indices, is_valid)`: an int32 tensor `[N, k]` and a bool tensor
            `[N]`. If one payload is not valid, valid payloads may decode to
            other indices.
        """
        # The payloads are decoded one by one, because XLA joins operations that
        # work number by number.
        indices, is_valid = zip(
            *map(self.decode, tf.unstack(words)), strict=True
        )
        return tf.stack(indices), tf.stack(is_valid)

    def num_used(self, words: tf.Tensor) -> tf.Tensor:
        """Number of the words that `encode` has used, a scalar int32 tensor."""
        del words
        return tf.constant(self.num_words)


class Every(IndexCodec):
    """No words, because with k = J there is only one set of indices."""

    @property
    def num_words(self) -> int:
        return 0

    def encode(self, indices: tf.Tensor) -> tf.Tensor:
        del indices
        return tf.zeros([0], tf.uint32)

    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        del words
        return ranges.range_from(tf.constant(0), self.size), tf.constant(True)


class Int32(IndexCodec):
    """Plain indices of 32 bits."""

    @property
    def num_words(self) -> int:
        return sizes.int32(self.k, self.size)

    def encode(self, indices: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(indices, tf.uint32)

    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.bitcast(words, tf.int32), tf.constant(True)


class Bitmap(IndexCodec):
    """A bitmap: one bit for each of the J entries."""

    @property
    def num_words(self) -> int:
        return sizes.bitmap(self.k, self.size)

    def encode(self, indices: tf.Tensor) -> tf.Tensor:
        return bitmap.of_positions(indices, self.num_words)

    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _positions_of_bits(words, self.k)

    def decode_all(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _positions_in_rows(words, self.k)


class EliasFano(IndexCodec):
    r"""Elias-Fano: plain low bits of each index, and its high bits in unary.

        low_i  = j_i mod 2^l              l = floor(log2(J / k))
        bit number floor(j_i / 2^l) + i of the rest is 1, others are 0

    The indices occupy `k (2 + l)` to `k (3 + l)` bits, whatever they are: at
    most 12 % more than the bound at densities up to 10 %.

    Source: Elias, "Efficient Storage and Retrieval by Content and Address of
    Static Files" (1974).
    """

    @property
    def num_words(self) -> int:
        return sizes.elias_fano(self.k, self.size)

    @property
    def _num_low(self) -> int:
        return sizes.elias_fano_low_bits(self.k, self.size)

    @property
    def _num_high_words(self) -> int:
        return sizes.elias_fano_high_words(self.k, self.size)

    def encode(self, indices: tf.Tensor) -> tf.Tensor:
        high = tf.bitwise.right_shift(indices, self._num_low)
        unary = high + ranges.range_from(ranges.opaque_zero(indices[0]), self.k)
        return tf.concat(
            [
                _pack_low(indices, self._num_low),
                bitmap.of_positions(unary, self._num_high_words),
            ],
            axis=0,
        )

    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        low, words = _split_low(words, self.k, self._num_low)
        unary, is_valid = _positions_of_bits(words, self.k)
        high = unary - ranges.range_from(ranges.opaque_zero(unary[0]), self.k)
        return tf.bitwise.left_shift(high, self._num_low) | low, is_valid

    def decode_all(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
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
    r"""Golomb: the gap before each index, plain low bits and the rest in unary.

        gap_i = j_i - j_{i-1} - 1         j_{-1} = -1
        low_i = gap_i mod 2^l, then floor(gap_i / 2^l) zeros and a one

    with the l that is best for indices spread evenly. Such indices occupy at
    most 2 % more bits than the bound at densities up to 10 %. The length
    changes with the indices.

    Sources: Golomb, "Run-length Encodings" (1966), in the form of Rice (1971);
    Sattler et al., "Robust and Communication-Efficient Federated Learning from
    Non-IID Data" (STC, 2019).
    """

    is_variable: ClassVar[bool] = True

    @property
    def num_words(self) -> int:
        return self._num_low_words - (-self._most_unary_bits // _WORD)

    @property
    def _most_unary_bits(self) -> int:
        return self.k + ((self.size - self.k) >> self._num_low)

    @property
    def _num_low(self) -> int:
        none_before = 1 - self.k / self.size

        def mean_bits(low: int) -> float:
            return low + 1 / (1 - none_before ** (1 << low))

        return min(range(31), key=mean_bits)

    @property
    def _num_low_words(self) -> int:
        return packing.num_words(self.k, self._num_low)

    def encode(self, indices: tf.Tensor) -> tf.Tensor:
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

    def decode(self, words: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        low, words = _split_low(words, self.k, self._num_low)
        unary, is_valid = _positions_of_bits(words, self.k)
        # The low parts are summed up, because `unary` holds the high parts of
        # the sums of all gaps so far.
        i = ranges.range_from(ranges.opaque_zero(unary[0]), self.k)
        high = tf.bitwise.left_shift(unary - i, self._num_low)
        return high + bitmap.cumulative_sum(low) + i, is_valid

    def num_used(self, words: tf.Tensor) -> tf.Tensor:
        # The words up to the last set bit are used, because zeros follow it.
        used = tf.cast(words[self._num_low_words :] != 0, tf.int32)
        number = 1 + ranges.range_from(
            ranges.opaque_zero(used[0]), used.shape[0]
        )
        return self._num_low_words + tf.reduce_max(used * number)


CODECS: dict[str, type[IndexCodec]] = {
    "int32": Int32,
    "elias_fano": EliasFano,
    "golomb": Golomb,
    "bitmap": Bitmap,
}


def choose(
    name: IndexCodecName | type[IndexCodec], k: int, size: int
) -> IndexCodec:
    """Makes the index codec of a name for k of J = `size` entries.

    Args:
        name: Key of `CODECS`, or `"auto"` for the shortest index codec of fixed
            length; or a subclass of `IndexCodec`.
        k: Number of indices.
        size: J, the number of entries of the gradient.

    Returns:
        `IndexCodec`.

    Example:

    >>> choose("auto", k=10, size=1000)
    EliasFano(k=10, size=1000)
    """
    if k == size:
        return Every(k, size)
    if isinstance(name, type):
        return name(k, size)
    if name == "elias_fano" and size + k >= 2**31 and 2 * k > size:
        raise ValueError(
            '`indices` must be "auto" or "bitmap" for so many entries, because '
            '"elias_fano" numbers its bits by int32. Received: indices='
            f'"elias_fano", k={k}, size={size}'
        )
    found = sizes.shortest(k, size) if name == "auto" else name
    return CODECS[found](k, size)


def _positions_of_bits(words: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the first k set bits, and whether exactly k bits are set."""
    num_set = tf.reduce_sum(bitmap.count_bits(words))
    return bitmap.positions(words, k), tf.equal(num_set, k)


def _positions_in_rows(words: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Applies `_positions_of_bits` to each row of words."""
    num_rows, num_words = words.shape
    num_set = tf.reduce_sum(bitmap.count_bits(words), axis=1)
    positions = tf.reshape(
        bitmap.positions(tf.reshape(words, [-1]), num_rows * k), [num_rows, k]
    )
    before = tf.range(num_rows)[:, tf.newaxis] * (num_words * _WORD)
    return positions - before, tf.equal(num_set, k)


def _pack_low(numbers: tf.Tensor, num_low: int) -> tf.Tensor:
    low = numbers & ((1 << num_low) - 1)
    return bit_packing.pack(tf.bitcast(low, tf.uint32), num_low)


def _split_low(
    words: tf.Tensor, k: int, num_low: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits `words` into the k low parts in front, and the other words."""
    num_words = packing.num_words(k, num_low)
    low = bit_packing.unpack(words[:num_words], k, num_low)
    return tf.bitcast(low, tf.int32), words[num_words:]
