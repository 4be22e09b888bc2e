"""Numbers of a fixed width, packed into 32-bit words without gaps.

A width is a sum of powers of two, and each of them is packed on its own: of a
9-bit number, 8 bits go to words that hold four such parts, and 1 bit to words
that hold 32, of consecutive numbers from the lowest bits on.
"""

import tensorflow as tf

_POWERS = (32, 16, 8, 4, 2, 1)


def num_words(size, width):
    """Number of words that `size` numbers of `width` bits take."""
    return sum(-(-size * part // 32) for part, _ in _parts(width))


def pack(numbers, width):
    """Packs numbers into words.

    Args:
        numbers: uint32 tensor `[n]`, each below `2 ** width`.
        width: Python integer from 0 to 32.

    Returns:
        uint32 tensor `[num_words(n, width)]`.

    Example:

    >>> pack(tf.constant([1, 2, 3], tf.uint32), width=2).numpy().tolist()
    [57]
    """
    packed = [tf.zeros([0], tf.uint32)]
    for part, shift in _parts(width):
        per_word = 32 // part
        length = num_words(numbers.shape[0], part)
        low = tf.bitwise.right_shift(numbers, tf.constant(shift, tf.uint32))
        low &= tf.constant((1 << part) - 1, tf.uint32)
        padding = per_word * length - numbers.shape[0]
        rows = tf.reshape(tf.pad(low, [[0, padding]]), [length, per_word])
        packed.append(
            tf.reduce_sum(tf.bitwise.left_shift(rows, _shifts(part)), axis=1)
        )
    return tf.concat(packed, axis=0)


def unpack(words, size, width):
    """The inverse of `pack`, for any contents.

    Args:
        words: uint32 tensor `[num_words(size, width)]`.
        size: Number of numbers, Python integer.
        width: As for `pack`.

    Returns:
        uint32 tensor `[size]`.
    """
    numbers = tf.zeros([size], tf.uint32)
    for part, shift in _parts(width):
        length = num_words(size, part)
        rows = words[:length, tf.newaxis]
        rows = tf.bitwise.right_shift(rows, _shifts(part))
        rows &= tf.constant((1 << part) - 1, tf.uint32)
        low = tf.reshape(rows, [-1])[:size]
        numbers |= tf.bitwise.left_shift(low, tf.constant(shift, tf.uint32))
        words = words[length:]
    return numbers


def _parts(width):
    """`(bits, position)` of each power of two in a width, the largest first."""
    parts, shift = [], 0
    for power in _POWERS:
        if width & power:
            parts.append((power, shift))
            shift += power
    return parts


def _shifts(part):
    return tf.constant(list(range(0, 32, part)), tf.uint32)
