"""Sizes of numbers of a fixed width that are packed into 32-bit words."""

WORD = 32
_POWERS = (32, 16, 8, 4, 2, 1)


def parts(width: int) -> list[tuple[int, int]]:
    """Splits a width into `(bits, position)` of its powers of 2, falling.

    Example:

    >>> parts(9)
    [(8, 0), (1, 8)]
    """
    found, shift = [], 0
    for power in _POWERS:
        if width & power:
            found.append((power, shift))
            shift += power
    return found


def num_words(size: int, width: int) -> int:
    """Number of words that `size` numbers of `width` bits occupy.

    Example:

    >>> num_words(5, width=9)
    3
    """
    return sum(-(-size * part // WORD) for part, _ in parts(width))
