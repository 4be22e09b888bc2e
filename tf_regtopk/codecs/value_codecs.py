r"""Value codecs: the values of the k entries as words, and back.

A value codec is a pair of pure functions between float values and 32-bit words;
k fixes the number of words. The part of a value that a value codec rounds away
stays in the residual error, and the sparsifier remembers the decoded values,
because these were delivered.

Decoded values must be the same to the bit on the sender and on every receiver,
whatever a compiler fuses. So decoding has at most one operation that rounds.

Stochastic rounding makes the decoded value right on average:

    round up with the probability (x - below) / (above - below)

The random numbers are hashes of the position, the seed, the step and the
replica, because XLA's own generators are slow on a CPU.
"""

import abc
import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk import validation
from tf_regtopk.codecs import bit_packing
from tf_regtopk.kernels import hashing
from tf_regtopk.sizes import values as sizes

# The step, and a number that tells apart those who round in it: the rank of a
# replica or more. Stochastic rounding depends on these scalar integers.
Stream = tuple[int | tf.Tensor, int | tf.Tensor]

# A float32 has its exponent here, by IEEE 754.
_EXPONENT_SHIFT, _EXPONENT_MASK = 23, 0xFF
# `Natural` writes this number of exponents below the largest for the value 0.
_NOTHING = 0x7F


@dataclasses.dataclass(frozen=True)
class ValueCodec(hyper_parameters.HyperParameters, abc.ABC):
    """Base class of value codecs: k float values as words, and back.

    A subclass is a frozen dataclass of its parameters. A subclass that is saved
    with a model must be registered with
    `keras.saving.register_keras_serializable`.
    """

    @abc.abstractmethod
    def num_words(self, k: int, dtype: tf.DType) -> int:
        """Number of words that k values of a float dtype occupy."""

    @abc.abstractmethod
    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        """Writes values.

        Args:
            values: float32 or float64 tensor `[k]`.
            stream: `(step, rank)`, scalar integers that stochastic rounding
                depends on.

        Returns:
            uint32 tensor `[num_words(k, dtype)]`.
        """

    @abc.abstractmethod
    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        """Reads values, from any words.

        Args:
            words: uint32 tensor `[num_words(k, dtype)]`.
            k: Number of values.
            dtype: Float dtype to return.

        Returns:
            Tensor `[k]` of `dtype`.
        """


class _Cast(ValueCodec):
    """Values in another float dtype, rounded to the nearest."""

    dtype: ClassVar[tf.DType]

    def num_words(self, k: int, dtype: tf.DType) -> int:
        del dtype
        return sizes.narrow(k)

    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        del stream
        # The cast saturates, because a value that is too large for the dtype is
        # sent in several steps.
        values = tf.saturate_cast(values, self.dtype)
        return bit_packing.pack(
            tf.cast(tf.bitcast(values, tf.uint16), tf.uint32), 16
        )

    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        numbers = tf.cast(bit_packing.unpack(words, k, 16), tf.uint16)
        return tf.cast(tf.bitcast(numbers, self.dtype), dtype)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class BFloat16(_Cast):
    """bfloat16: 16 bits, of which 8 are significant, the range of float32.

    Example:

    >>> BFloat16().num_words(1000, tf.float32)
    500
    """

    dtype = tf.bfloat16


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Float16(_Cast):
    """float16: 16 bits, of which 11 are significant, magnitudes to 65,504.

    Example:

    >>> Float16().num_words(1000, tf.float32)
    500
    """

    dtype = tf.float16


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Float32(ValueCodec):
    """Plain values: 32 bits, or 64 if any variable has float64.

    Example:

    >>> [Float32().num_words(1000, t) for t in (tf.float32, tf.float64)]
    [1000, 2000]
    """

    def num_words(self, k: int, dtype: tf.DType) -> int:
        return sizes.plain(k, dtype.size)

    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        del stream
        # The words are reshaped, because a float64 is bitcast to two words on
        # an axis of their own.
        return tf.reshape(tf.bitcast(values, tf.uint32), [-1])

    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        if dtype.size > 4:
            words = tf.reshape(words, [k, dtype.size // 4])
        return tf.bitcast(words, dtype)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Natural(ValueCodec):
    r"""Natural compression: sign and power of two, stochastically rounded.

        decoded = sign(v) 2^e or sign(v) 2^{e+1},     2^e <= |v| < 2^{e+1}

    with the mean v, and a second moment of at most 9/8 v^2. A value occupies 8
    bits. Exponents count down from the largest, so that values below 2^-126 of
    the largest power become 0 (as do denormal values).

    Args:
        seed: Non-negative integer that stochastic rounding depends on.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Natural().num_words(1000, tf.float32)
    251

    Source: Horvath et al., "Natural Compression for Distributed Deep Learning"
    (2019).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        self._check_integer("seed", minimum=0)

    def num_words(self, k: int, dtype: tf.DType) -> int:
        del dtype
        return sizes.natural(k)

    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        pattern = tf.bitcast(_to_float32(values), tf.int32)
        exponent = tf.bitwise.right_shift(pattern, _EXPONENT_SHIFT)
        exponent &= _EXPONENT_MASK
        # The fraction is exact: |v| / 2^e - 1.
        mantissa = tf.cast(pattern & ((1 << _EXPONENT_SHIFT) - 1), tf.float32)
        is_up = mantissa * 2.0**-_EXPONENT_SHIFT > hashing.uniform(
            values.shape[0], self.seed, *stream
        )
        # The largest exponent is 254, because 255 stands for infinity.
        rounded = tf.minimum(exponent + tf.cast(is_up, tf.int32), 254)
        rounded = tf.where(exponent == 0, 0, rounded)
        largest = tf.reduce_max(rounded)
        below = tf.where(rounded == 0, _NOTHING, largest - rounded)
        negative = tf.bitwise.right_shift(pattern, 31) & 0x80
        numbers = negative | tf.minimum(below, _NOTHING)
        return tf.concat(
            [
                tf.bitcast(largest[tf.newaxis], tf.uint32),
                bit_packing.pack(tf.bitcast(numbers, tf.uint32), 8),
            ],
            axis=0,
        )

    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        largest = tf.bitcast(words[0], tf.int32) & _EXPONENT_MASK
        numbers = tf.bitcast(bit_packing.unpack(words[1:], k, 8), tf.int32)
        below = numbers & _NOTHING
        exponent = tf.maximum(largest - below, 0)
        exponent = tf.where(below == _NOTHING, 0, exponent)
        pattern = tf.bitwise.left_shift(numbers & 0x80, 24)
        pattern |= tf.bitwise.left_shift(exponent, _EXPONENT_SHIFT)
        return tf.cast(tf.bitcast(pattern, tf.float32), dtype)


class _InBuckets(ValueCodec):
    """Base class of value codecs whose `bucket_size` values share a scale."""

    bucket_size: int | None

    def _size_of_bucket(self, k: int) -> int:
        return sizes.size_of_bucket(k, self.bucket_size)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class Uniform(_InBuckets):
    r"""Even levels between the extremes of each bucket, stochastically rounded.

        decoded = low + c step,    c in {0, ..., 2^b - 1}
        step    = (high - low) / (2^b - 1), rounded up to 16 significant bits

    with the mean v. A bucket adds 64 bits, for halves of `low` and `step`.

    Args:
        num_bits: b, integer from 1 to 8, the bits of a value.
        bucket_size: Positive integer, the number of consecutive values that
            share `low` and `step`.
        seed: Non-negative integer that stochastic rounding depends on.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> Uniform().num_words(1000, tf.float32)
    127

    Sources: Alistarh et al., "QSGD" (2017), here with the bounds of Markov et
    al., "CGX" (2022).
    """

    num_bits: int = 4
    bucket_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_integer("num_bits", minimum=1)
        validation.check_number(
            "num_bits", self.num_bits, "from 1 to 8", lambda b: b <= 8
        )
        self._check_integer("bucket_size", minimum=1)
        self._check_integer("seed", minimum=0)

    def num_words(self, k: int, dtype: tf.DType) -> int:
        del dtype
        return sizes.uniform(k, self.num_bits, self.bucket_size)

    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        k = values.shape[0]
        # Values are halved, because a difference of two values may be too large
        # for a float32.
        halves = _in_buckets(0.5 * _to_float32(values), self._size_of_bucket(k))
        low = tf.reduce_min(halves, axis=1)
        most = (1 << self.num_bits) - 1
        step = _round_up((tf.reduce_max(halves, axis=1) - low) / most)
        position = (halves - low[:, tf.newaxis]) / step[:, tf.newaxis]
        position = tf.reshape(position, [-1])[:k]
        below = tf.floor(position)
        is_up = position - below > hashing.uniform(k, self.seed, *stream)
        level = below + tf.cast(is_up, tf.float32)
        # NaN becomes level 0, because the step is 0 where all values are equal.
        level = tf.where(level > 0, tf.minimum(level, float(most)), 0.0)
        return tf.concat(
            [
                tf.bitcast(tf.concat([low, step], axis=0), tf.uint32),
                bit_packing.pack(tf.cast(level, tf.uint32), self.num_bits),
            ],
            axis=0,
        )

    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        num_buckets = sizes.num_buckets(k, self.bucket_size)
        bounds = tf.bitcast(words[: 2 * num_buckets], tf.float32)
        low, step = bounds[:num_buckets], bounds[num_buckets:]
        level = bit_packing.unpack(words[2 * num_buckets :], k, self.num_bits)
        level = tf.cast(tf.bitcast(level, tf.int32), tf.float32)
        # The product is exact, because a step has 16 significant bits.
        half = _of_bucket(low, self._size_of_bucket(k), k) + level * _of_bucket(
            step, self._size_of_bucket(k), k
        )
        largest = 0.5 * tf.float32.max
        decoded = 2.0 * tf.clip_by_value(half, -largest, largest)
        return tf.cast(decoded, dtype)


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class ScaledSign(_InBuckets):
    r"""The sign of each value, times the mean magnitude of its bucket.

        decoded = sign(v) mean of |v| over the bucket

    A value occupies one bit, and a bucket 32 bits. The sign of 0 counts as
    positive.

    Args:
        bucket_size: Positive integer, the number of consecutive values that
            share a magnitude; None for all values. With k selected entries one
            bucket makes the ternary code of STC: +mean, -mean, or not sent.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> ScaledSign().num_words(1000, tf.float32)
    33

    Sources: Karimireddy et al., "Error Feedback Fixes SignSGD and other
    Gradient Compression Schemes" (2019); Sattler et al., "Robust and
    Communication-Efficient Federated Learning from Non-IID Data" (STC, 2019).
    """

    bucket_size: int | None = None

    def __post_init__(self) -> None:
        if self.bucket_size is not None:
            self._check_integer("bucket_size", minimum=1)

    def num_words(self, k: int, dtype: tf.DType) -> int:
        del dtype
        return sizes.scaled_sign(k, self.bucket_size)

    def encode(self, values: tf.Tensor, stream: Stream) -> tf.Tensor:
        del stream
        k = values.shape[0]
        values = _to_float32(values)
        bucket_size = self._size_of_bucket(k)
        num_buckets = sizes.num_buckets(k, bucket_size)
        padded = tf.pad(values, [[0, num_buckets * bucket_size - k]])
        counts = tf.minimum(
            tf.fill([num_buckets], bucket_size),
            k - bucket_size * tf.range(num_buckets),
        )
        # Values are divided before the sum, because the sum of the undivided
        # values may be too large for a float32.
        parts = tf.abs(tf.reshape(padded, [num_buckets, bucket_size]))
        mean = tf.reduce_sum(
            parts / tf.cast(counts, tf.float32)[:, tf.newaxis], axis=1
        )
        return tf.concat(
            [
                tf.bitcast(mean, tf.uint32),
                bit_packing.pack(tf.cast(values < 0, tf.uint32), 1),
            ],
            axis=0,
        )

    def decode(self, words: tf.Tensor, k: int, dtype: tf.DType) -> tf.Tensor:
        bucket_size = self._size_of_bucket(k)
        num_buckets = sizes.num_buckets(k, bucket_size)
        mean = tf.bitcast(words[:num_buckets], tf.float32)
        magnitude = _of_bucket(mean, bucket_size, k)
        is_negative = bit_packing.unpack(words[num_buckets:], k, 1) > 0
        return tf.cast(tf.where(is_negative, -magnitude, magnitude), dtype)


CODECS: dict[sizes.ValueCodecName, ValueCodec] = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
    "float16": Float16(),
    "natural": Natural(),
    "uniform": Uniform(),
    "sign": ScaledSign(bucket_size=1024),
    "ternary": ScaledSign(),
}


def _to_float32(values: tf.Tensor) -> tf.Tensor:
    # A float32 is not cast, because XLA keeps even a cast to the same dtype.
    if values.dtype == tf.float32:
        return values
    return tf.saturate_cast(values, tf.float32)


def _in_buckets(values: tf.Tensor, bucket_size: int) -> tf.Tensor:
    """Makes rows of `bucket_size` values; the last value fills the last row."""
    padding = tf.fill([-values.shape[0] % bucket_size], values[-1])
    return tf.reshape(tf.concat([values, padding], axis=0), [-1, bucket_size])


def _of_bucket(numbers: tf.Tensor, bucket_size: int, k: int) -> tf.Tensor:
    """Repeats the number of each bucket for its values, `[k]`."""
    shape = [numbers.shape[0], bucket_size]
    return tf.reshape(tf.broadcast_to(numbers[:, tf.newaxis], shape), [-1])[:k]


def _round_up(steps: tf.Tensor) -> tf.Tensor:
    """Rounds non-negative float32 `steps` up to 16 significant bits."""
    pattern = (tf.bitcast(steps, tf.int32) + 0xFF) & ~0xFF
    # The limit is the largest such float that is finite.
    return tf.bitcast(tf.minimum(pattern, 0x7F7FFF00), tf.float32)
