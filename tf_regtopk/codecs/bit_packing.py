"""Numbers of a fixed width, packed into 32-bit words without gaps.

A width is a sum of powers of two, and each power is packed on its own: 8 bits
of a 9-bit number go to words that hold four such parts, and 1 bit to words that
hold 32 such parts, of consecutive numbers from the lowest bits on.
"""

import tensorflow as tf

from tf_regtopk.sizes import packing


def pack(numbers: tf.Tensor, width: int) -> tf.Tensor:
    """Packs numbers into words.

    Args:
        numbers: uint32 tensor `[n]`, each below `2 ** width`.
        width: Bits of a number, from 0 to 32.

    Returns:
        uint32 tensor `[packing.num_words(n, width)]`.

    Example:

    >>> pack(tf.constant([1, 2, 3], tf.uint32), width=2).numpy().tolist()
    [57]
    """
    packed = [tf.zeros([0], tf.uint32)]
    for part, shift in packing.parts(width):
        per_word = 32 // part
        length = packing.num_words(numbers.shape[0], part)
        low = tf.bitwise.right_shift(numbers, tf.constant(shift, tf.uint32))
        low &= tf.constant((1 << part) - 1, tf.uint32)
        padding = per_word * length - numbers.shape[0]
        rows = tf.reshape(tf.pad(low, [[0, padding]]), [length, per_word])
        packed.append(
            tf.reduce_sum(tf.bitwise.left_shift(rows, _shifts(part)), axis=1)
        )
    return tf.concat(packed, axis=0)


def unpack(words: tf.Tensor, size: int, width: int) -> tf.Tensor:
    """Inverts `pack`, for words of any contents.

    Args:
        words: uint32 tensor `[packing.num_words(size, width)]`.
        size: Number of numbers.
        width: Bits of a number, from 0 to 32.

    Returns:
        uint32 tensor `[size]`.
    """
    numbers = tf.zeros([size], tf.uint32)
    for part, shift in packing.parts(width):
        length = packing.num_words(size, part)
        rows = words[:length, tf.newaxis]
        rows = tf.bitwise.right_shift(rows, _shifts(part))
        rows &= tf.constant((1 << part) - 1, tf.uint32)
        low = tf.reshape(rows, [-1])[:size]
        numbers |= tf.bitwise.left_shift(low, tf.constant(shift, tf.uint32))
        words = words[length:]
    return numbers


def _shifts(part: int) -> tf.Tensor:
    return tf.constant(list(range(0, 32, part)), tf.uint32)
