"""Scores as integers in the order of their magnitudes, in rows by group."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ranges
from tf_regtopk.selection import kth_largest as kth_largest_lib

# Bits in a digit of the radix search. Wide digits take fewer passes; few keys
# and many groups take narrow digits, because wide digits make large histograms.
WIDE_DIGIT, NARROW_DIGIT = 16, 8
_FEWEST_FOR_WIDE = 1 << 18


class Group(NamedTuple):
    """A run of consecutive entries from which a fixed number is selected.

    Args:
        size: Number of entries in the run.
        k: Number of entries to select, in [1, size].
    """

    size: int
    k: int


class Keys(NamedTuple):
    """Keys in rows of 32, in which each group starts on a row of its own.

    Args:
        rows: Integer tensor `[words, 32]`; rows are filled up with -1, which is
            below every key.
        group_of_word: int32 tensor, the group of each row: of shape `[words]`,
            or `[1]` if there is only one group.
        first_word: int32 array, the first row of each group.
    """

    rows: tf.Tensor
    group_of_word: tf.Tensor
    first_word: np.ndarray


def order_preserving(scores: tf.Tensor) -> tf.Tensor:
    """Returns non-negative integers in the order of the scores' magnitudes."""
    integer = key_type(scores.dtype)
    # The mask clears the sign bit, because only magnitudes count.
    return tf.bitcast(scores, integer) & integer.max


def key_type(dtype: tf.DType) -> tf.DType:
    """Returns the integer dtype of the keys of scores of a float dtype."""
    return tf.int64 if dtype == tf.float64 else tf.int32


def in_rows(keys: tf.Tensor, sizes: Sequence[int]) -> Keys:
    """Puts an integer tensor of keys, with groups of these sizes, in `Keys`."""
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


def kth_largest(
    keys: Keys, ks: Sequence[int | tf.Tensor], num_bits: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the k-th largest key of each group of `Keys`.

    Args:
        keys: `Keys`, of which negative ones do not take part.
        ks: The k of each group, integers or scalar int32 tensors.
        num_bits: Number of the highest bits to search at least, if a lower
            bound is enough. Defaults to all bits.

    Returns:
        `(threshold, num_ties)` of `kth_largest.kth_largest`.
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


def mark_largest(keys: Keys, ks: Sequence[int | tf.Tensor]) -> tf.Tensor:
    """Marks the k largest of each group of `Keys` in a bitmap.

    Among equal keys the first ones are marked.
    """
    threshold, num_ties = kth_largest(keys, ks)
    threshold = tf.gather(threshold, keys.group_of_word)[:, tf.newaxis]
    larger, ties = bitmap.pack(keys.rows > threshold, keys.rows == threshold)
    return larger | first_bits(
        ties, num_ties, keys.group_of_word, keys.first_word
    )


def first_bits(
    words: tf.Tensor,
    num_kept: tf.Tensor,
    group_of_word: tf.Tensor | Sequence[int] = (0,),
    first_word: np.ndarray | Sequence[int] = (0,),
) -> tf.Tensor:
    """Keeps only the first `num_kept` set bits of each group of words.

    Args:
        words: uint32 tensor `[words]`.
        num_kept: int32 tensor `[groups]`, at least 1 and at most the number of
            set bits.
        group_of_word: The group of each word, `[words]`, or `[1]` if there is
            only one group.
        first_word: The first word of each group.

    Returns:
        uint32 tensor `[words]`.
    """
    before = bitmap.bits_before(words)
    before -= tf.gather(tf.gather(before, first_word), group_of_word)
    if device_kind.is_gpu():
        # Each bit is decided on its own, because that takes only one kernel.
        num_kept = tf.gather(num_kept, group_of_word) - before
        is_kept = bitmap.set_bits_before(words) < num_kept[:, tf.newaxis]
        kept = tf.where(is_kept, bitmap.unpack(words), 0)
        return tf.reduce_sum(tf.bitwise.left_shift(kept, bitmap.BITS), axis=1)
    num_groups = len(first_word)
    is_kept = before < tf.gather(num_kept, group_of_word)
    num_words = bitmap.histogram(
        tf.where(is_kept, group_of_word, num_groups), num_groups
    )
    # Only the last of these words is cut, because only it may have bits too
    # many. (A cut of each word would be computed anew for every bit.)
    last = first_word + num_words - 1
    return tf.tensor_scatter_nd_update(
        tf.where(is_kept, words, tf.constant(0, words.dtype)),
        last[:, tf.newaxis],
        bitmap.lowest(
            tf.gather(words, last), num_kept - tf.gather(before, last)
        ),
    )


def in_squares(scores: tf.Tensor) -> list[tf.Tensor]:
    """Splits keys into whole squares of bits and the rest, padded with -1."""
    # Only the rest is padded, because a pad of all slows down the whole pass.
    rest = scores.shape[0] % bitmap.SQUARE
    parts = tf.split(scores, [scores.shape[0] - rest, rest])
    whole, rest_keys = map(order_preserving, parts)
    padding = [[0, -rest % bitmap.SQUARE]]
    return [whole, tf.pad(rest_keys, padding, constant_values=-1)]


def pack_where(
    scores: tf.Tensor, *conditions: Callable[[tf.Tensor], tf.Tensor]
) -> list[tf.Tensor]:
    """Packs a bitmap of the keys that meet each condition.

    Args:
        scores: Float tensor `[J]`.
        *conditions: Functions of an integer tensor of keys to a bool tensor,
            False for -1.

    Returns:
        List of a uint32 tensor for each condition.
    """
    parts = in_squares(scores)
    return bitmap.pack(
        *([condition(part) for part in parts] for condition in conditions)
    )
