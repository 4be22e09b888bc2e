"""Scores as integers in the order of their magnitudes, in rows by group."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ranges
from tf_regtopk.selection import kth_largest as kth_largest_lib

# Bits in a digit of the radix search.  Wide digits take fewer passes; few keys
# and many groups take narrow ones, because of the size of the histograms.
WIDE_DIGIT, NARROW_DIGIT = 16, 8
_FEWEST_FOR_WIDE = 1 << 18


class Group(NamedTuple):
    """A run of consecutive entries of which a fixed number is selected.

    Args:
        size: Number of entries in the run.
        k: Number of entries to select, in [1, size].
    """

    size: int
    k: int


class Keys(NamedTuple):
    """Keys in rows of 32, in which each group starts on a row of its own.

    Args:
        rows: Integer tensor `[words, 32]`; -1, below every key, fills up rows.
        group_of_word: int32 tensor `[words]`, the group of each row; of shape
            `[1]` if there is but one group.
        first_word: int32 array, the first row of each group.
    """

    rows: tf.Tensor
    group_of_word: tf.Tensor
    first_word: np.ndarray


def order_preserving(scores):
    """Non-negative integers in the order of the magnitudes of `scores`."""
    integer = key_type(scores.dtype)
    # The mask clears the sign bit.
    return tf.bitcast(scores, integer) & integer.max


def key_type(dtype):
    """The integers in which keys of scores of this dtype are held."""
    return tf.int64 if dtype == tf.float64 else tf.int32


def in_rows(keys, sizes):
    """`Keys` of the integer tensor `keys`, which has groups of these sizes."""
    num_words = [-(-size // bitmap.WORD) for size in sizes]
    num_words[-1] += -sum(num_words) % bitmap.WORD
    parts = []
    for part, n in zip(tf.split(keys, sizes), num_words, strict=True):
        padding = n * bitmap.WORD - part.shape[0]
        parts += [part, tf.fill([padding], tf.constant(-1, keys.dtype))]
    first_word = np.cumsum([0] + num_words[:-1], dtype=np.int32)
    if len(sizes) > 1:
        # XLA must not know the starts, because it would store the groups of all
        # words in the executable.
        starts = first_word[1:] + ranges.run_time_zero(keys[0])
        group_of_word = bitmap.run_of_each(starts, sum(num_words))
    else:
        group_of_word = tf.zeros([1], tf.int32)
    return Keys(
        rows=tf.reshape(tf.concat(parts, axis=0), [-1, bitmap.WORD]),
        group_of_word=group_of_word,
        first_word=first_word,
    )


def kth_largest(keys, ks, num_bits=None):
    """As `kth_largest.kth_largest`, of `Keys`; negative ones do not take part.

    Where a lower bound will do, `num_bits` says of how many bits at least.
    """
    if len(ks) == 1 and device_kind.is_gpu():
        threshold, num_ties = kth_largest_lib.kth_largest_by_counting(
            keys.rows, ks[0], num_bits
        )
        return threshold[tf.newaxis], num_ties[tf.newaxis]
    rows, group = keys.rows, keys.group_of_word[:, tf.newaxis]
    is_large = rows.shape.num_elements() >= _FEWEST_FOR_WIDE
    digit_bits = WIDE_DIGIT if len(ks) == 1 and is_large else NARROW_DIGIT
    return kth_largest_lib.kth_largest(
        lambda shift, prefix: kth_largest_lib.digit_histogram(
            rows, group, shift, prefix, digit_bits
        ),
        ks,
        rows.dtype,
        digit_bits,
    )


def mark_largest(keys, ks):
    """Bitmap of the k largest of each group of `Keys`.

    Of equal keys those in front come first.
    """
    threshold, num_ties = kth_largest(keys, ks)
    threshold = tf.gather(threshold, keys.group_of_word)[:, tf.newaxis]
    larger, ties = bitmap.pack(keys.rows > threshold, keys.rows == threshold)
    return larger | first_bits(
        ties, num_ties, keys.group_of_word, keys.first_word
    )


def first_bits(words, num_kept, group_of_word=(0,), first_word=(0,)):
    """The bitmap with only the first `num_kept` bits of each group of words.

    Args:
        words: uint32 tensor `[words]`.
        num_kept: int32 tensor `[groups]`, none less than 1 or more than there
            are bits.
        group_of_word: As of `Keys`.
        first_word: As of `Keys`.

    Returns:
        uint32 tensor `[words]`.
    """
    before = bitmap.bits_before(words)
    before -= tf.gather(tf.gather(before, first_word), group_of_word)
    if device_kind.is_gpu():
        # Bit by bit, because that takes but one kernel.
        num_kept = tf.gather(num_kept, group_of_word) - before
        is_kept = bitmap.set_bits_before(words) < num_kept[:, tf.newaxis]
        kept = tf.where(is_kept, bitmap.unpack(words), 0)
        return tf.reduce_sum(tf.bitwise.left_shift(kept, bitmap.BITS), axis=1)
    num_groups = len(first_word)
    is_kept = before < tf.gather(num_kept, group_of_word)
    num_words = bitmap.histogram(
        tf.where(is_kept, group_of_word, num_groups), num_groups
    )
    # Only of the last of these words some bits may have to go.  (To cut each
    # word to its own number of bits would be computed anew for every bit.)
    last = first_word + num_words - 1
    return tf.tensor_scatter_nd_update(
        tf.where(is_kept, words, tf.constant(0, words.dtype)),
        last[:, tf.newaxis],
        bitmap.lowest(
            tf.gather(words, last), num_kept - tf.gather(before, last)
        ),
    )


def in_squares(scores):
    """Keys of whole squares of bits, and of the rest, filled up with -1."""
    # Only the rest is padded: XLA would slow down the whole pass.
    rest = scores.shape[0] % bitmap.SQUARE
    parts = tf.split(scores, [scores.shape[0] - rest, rest])
    whole, rest_keys = map(order_preserving, parts)
    padding = [[0, -rest % bitmap.SQUARE]]
    return [whole, tf.pad(rest_keys, padding, constant_values=-1)]


def pack_where(scores, *conditions):
    """Bitmaps of the scores whose keys meet each condition; no -1 may do."""
    parts = in_squares(scores)
    return bitmap.pack(
        *([condition(part) for part in parts] for condition in conditions)
    )
