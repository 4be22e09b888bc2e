"""Numbers of words of k values, by value code.

`codecs/value_codecs.py` describes the codes.
"""

from collections.abc import Callable
import functools
from typing import Literal

from tf_regtopk.sizes import packing

ValueCodecName = Literal[
    "float32",
    "bfloat16",
    "float16",
    "natural",
    "uniform",
    "sign",
    "ternary",
]


def plain(k: int, num_bytes: int) -> int:
    """Number of words of values of 4 or 8 bytes."""
    return k * num_bytes // 4


def narrow(k: int) -> int:
    """Number of words of values of 16 bits."""
    return packing.num_words(k, 16)


def natural(k: int) -> int:
    """Number of words of signs and exponents, and of the largest exponent."""
    return 1 + packing.num_words(k, 8)


def uniform(k: int, num_bits: int, bucket_size: int) -> int:
    """Number of words of levels, and of two bounds for each bucket."""
    return 2 * num_buckets(k, bucket_size) + packing.num_words(k, num_bits)


def scaled_sign(k: int, bucket_size: int | None) -> int:
    """Number of words of signs, and of a magnitude for each bucket."""
    return num_buckets(k, bucket_size) + packing.num_words(k, 1)


def num_buckets(k: int, bucket_size: int | None) -> int:
    """Number of buckets of k values; with None all values share one bucket."""
    return -(-k // size_of_bucket(k, bucket_size))


def size_of_bucket(k: int, bucket_size: int | None) -> int:
    """Number of values of a bucket, no more than there are."""
    return min(bucket_size or k, k)


# The codes of float32 values, as `Codec` knows them by name.
CODES: dict[ValueCodecName, Callable[[int], int]] = {
    "float32": functools.partial(plain, num_bytes=4),
    "bfloat16": narrow,
    "float16": narrow,
    "natural": natural,
    "uniform": functools.partial(uniform, num_bits=4, bucket_size=1024),
    "sign": functools.partial(scaled_sign, bucket_size=1024),
    "ternary": functools.partial(scaled_sign, bucket_size=None),
}
