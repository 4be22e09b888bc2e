"""Numbers of words of k of J indices, by index code of fixed length.

`codecs/index_codecs.py` describes the codes.
"""

from collections.abc import Callable

from tf_regtopk.sizes import packing


def int32(k: int, size: int) -> int:
    """Number of words of plain indices."""
    del size
    return k


def elias_fano(k: int, size: int) -> int:
    """Number of words of the low bits and of the high bits in unary."""
    low_words = packing.num_words(k, elias_fano_low_bits(k, size))
    return low_words + elias_fano_high_words(k, size)


def elias_fano_low_bits(k: int, size: int) -> int:
    """Number l of low bits of each index, `floor(log2(J / k))`."""
    return max(0, (size // k).bit_length() - 1)


def elias_fano_high_words(k: int, size: int) -> int:
    """Number of words of the high bits in unary."""
    high_bits = k + ((size - 1) >> elias_fano_low_bits(k, size))
    return -(-high_bits // packing.WORD)


def bitmap(k: int, size: int) -> int:
    """Number of words with a bit for each of the J entries."""
    del k
    return -(-size // packing.WORD)


# Where two codes are of one length, the first is the shortest.
CODES: dict[str, Callable[[int, int], int]] = {
    "int32": int32,
    "elias_fano": elias_fano,
    "bitmap": bitmap,
}


def shortest(k: int, size: int) -> str:
    """Name of the code that takes the fewest words.

    Example:

    >>> shortest(k=10, size=1000)
    'elias_fano'
    """
    return min(CODES, key=lambda name: CODES[name](k, size))


def num_words(name: str, k: int, size: int) -> int:
    """Number of words of the indices of k of J = `size` entries.

    Args:
        name: Key of `CODES`, or `"auto"` for the shortest.
        k: Number of indices.
        size: J, the number of entries of the gradient.

    Returns:
        Number of words, 0 if k = J, because there is only one such set.

    Example:

    >>> num_words("auto", k=10, size=1000)
    4
    """
    if k == size:
        return 0
    return CODES[shortest(k, size) if name == "auto" else name](k, size)
