"""Exact selection of the k largest scores, in a form that XLA compiles.

`tf.math.top_k` is not used: compiled by XLA for the CPU it returns wrong
entries for some sizes (TensorFlow 2.21), and it breaks no ties by position.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk import hashing

# Selected entries are marked in words of 32 bits, one bit an entry.
_WORD = 32
# Below this size, sampling costs more than it saves.
_SMALLEST_SAMPLED = 1 << 17


class Group(NamedTuple):
    """A run of consecutive entries of which a fixed number is selected.

    Args:
        size: Number of entries in the run.
        k: Number of entries to select, in [1, size].
    """

    size: int
    k: int


def select_largest(scores, groups, step=0):
    r"""Returns the positions of the k largest scores of each group.

    With `T` the k-th largest score of a group, every entry above `T` is
    selected, and of those equal to `T` the ones with the lowest positions, so
    that exactly k are selected and every run and every replica agrees:

        s = {j : score_j > T}  +  the first k - |{j : score_j > T}| of
                                  {j : score_j = T}

    Scores are compared by their bit patterns, which order non-negative floats
    as their values do; NaN counts as larger than any number.

    Args:
        scores: Non-negative float32 or float64 tensor of shape `[J]`.
        groups: Sequence of `Group` whose sizes add up to J.
        step: Integer, or scalar integer tensor. Changes which scores are
            sampled to save time, and never the result.

    Returns:
        int32 tensor of shape `[sum of k]`: positions in `scores`, rising.

    Example:

    >>> scores = tf.constant([0.5, 3.0, 0.1, 3.0, 2.0])
    >>> select_largest(scores, [Group(size=5, k=2)]).numpy().tolist()
    [1, 3]
    >>> select_largest(scores, [Group(3, 1), Group(2, 1)]).numpy().tolist()
    [1, 3]
    """
    keys = _order_preserving_keys(scores)
    if len(groups) == 1 and groups[0].size >= _SMALLEST_SAMPLED:
        return _select_among_candidates(keys, groups[0], step)
    return _select(keys, groups)


def _select_among_candidates(keys, group, step):
    r"""As `_select` for one large group, most of which a sample rules out.

        bound      = the r-th largest of m sampled keys
        candidates = {j : key_j >= bound}, compacted in one pass over the keys

    The k largest keys are among the candidates whenever there are k of them; r
    is so far above its expectation m k / J that there nearly always are. If
    there are not, or more than there is room for (masses of ties), all keys are
    searched.
    """
    size, k = group
    num_samples, rank, room = _sampling_plan(size, k)
    if rank >= num_samples or room >= size:
        return _select(keys, [group])

    bound = _sampled_bound(keys, num_samples, rank, step)
    words = _pack_bits(_in_words(keys) >= bound)
    num_candidates = tf.reduce_sum(_count_bits(words))

    def among_candidates():
        word, bit = _positions_of_bits(words, room)
        position = tf.minimum(word * _WORD + bit, size - 1)
        is_candidate = tf.range(room) < num_candidates
        candidates = tf.where(is_candidate, tf.gather(keys, position), -1)
        return tf.gather(position, _select(candidates, [Group(room, k)]))

    return tf.cond(
        (num_candidates >= k) & (num_candidates <= room),
        among_candidates,
        lambda: _select(keys, [group]),
    )


def _sampling_plan(size, k):
    """`(m, r, room)`: samples, rank among them, most candidates to expect."""
    num_samples = min(max(size // 96, 1 << 14), 1 << 17) // _WORD * _WORD
    # 4 standard deviations to either side of a Poisson count.
    expected = num_samples * k / size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 1)
    room = size / num_samples * (rank + 4 * math.sqrt(rank) + 1)
    return num_samples, rank, math.ceil(room / _WORD) * _WORD


def _sampled_bound(keys, num_samples, rank, step):
    """The key of the given rank among samples, one from each equal stretch.

    Where in its stretch a sample lies changes with the stretch and the step, so
    that the bound cannot keep missing a pattern in the keys.
    """
    stretch = keys.shape[0] // num_samples
    random = tf.bitwise.right_shift(
        hashing.hash_bits(num_samples, 0, step), tf.constant(16, tf.uint32)
    )
    offset = tf.bitwise.right_shift(
        tf.bitcast(random, tf.int32) * stretch, tf.constant(16, tf.int32)
    )
    samples = tf.gather(keys, tf.range(num_samples) * stretch + offset)
    threshold, _ = _kth_largest(
        _in_words(samples), tf.zeros([num_samples // _WORD], tf.int32), [rank]
    )
    return threshold[0]


def _in_words(keys):
    """`keys` in rows of 32; key -1, below every key, fills up the last row."""
    keys = tf.pad(keys, [[0, -keys.shape[0] % _WORD]], constant_values=-1)
    return tf.reshape(keys, [-1, _WORD])


def _select(keys, groups):
    """As `select_largest`, for integer keys; negative ones do not take part."""
    # Each group starts on a word of its own.
    num_words = [-(-group.size // _WORD) for group in groups]
    padding = [
        n * _WORD - group.size
        for n, group in zip(num_words, groups, strict=True)
    ]
    keys = tf.concat(
        [_in_words(part) for part in tf.split(keys, [g.size for g in groups])],
        axis=0,
    )
    group_of_word = tf.concat(
        [tf.fill([n], g) for g, n in enumerate(num_words)], axis=0
    )

    threshold, num_ties = _kth_largest(
        keys, group_of_word, [group.k for group in groups]
    )
    threshold = tf.gather(threshold, group_of_word)[:, tf.newaxis]
    ties = _pack_bits(keys == threshold)
    ties_before = tf.cumsum(_count_bits(ties), exclusive=True)
    first_word = np.cumsum([0] + num_words[:-1], dtype=np.int32)
    ties_before -= tf.gather(tf.gather(ties_before, first_word), group_of_word)
    ties_left = tf.gather(num_ties, group_of_word) - ties_before
    words = _pack_bits(keys > threshold) | _lowest_bits(ties, ties_left)

    word, bit = _positions_of_bits(words, sum(group.k for group in groups))
    padding_before = np.cumsum([0] + padding[:-1], dtype=np.int32)
    return (
        word * _WORD
        + bit
        - tf.gather(padding_before, tf.gather(group_of_word, word))
    )


def _order_preserving_keys(scores):
    """Non-negative integers in the order of the non-negative `scores`."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    # The mask clears the sign bit, which -0.0 and some NaNs carry.
    return tf.bitcast(scores, integer) & integer.max


def _kth_largest(keys, group_of_word, ks):
    """The k-th largest key of each group, by radix search from the top digit.

    Args:
        keys: Integer tensor `[words, 32]`; negative keys do not take part.
        group_of_word: int32 tensor `[words]`.
        ks: The k of each group.

    Returns:
        `(threshold, num_ties)`, both of shape `[groups]`: the k-th largest key,
        and how many of the keys equal to it belong to the k largest.
    """
    num_groups = len(ks)
    key_bits = 8 * keys.dtype.size - 1
    # Wide digits take fewer passes; small and many groups take narrow ones,
    # because each group has a histogram of its own.
    narrow = num_groups > 1 or keys.shape.num_elements() < 1 << 16
    digit_bits = 8 if narrow else 16
    num_digits = 1 << digit_bits
    group = group_of_word[:, tf.newaxis]

    def next_digit(shift, prefix, remaining):
        rest = tf.bitwise.right_shift(keys, shift)
        digit = tf.cast(rest & (num_digits - 1), tf.int32)
        rest = tf.bitwise.right_shift(rest, tf.constant(digit_bits, keys.dtype))
        candidate = (rest == tf.gather(prefix, group)) & (keys >= 0)
        # One more bin takes the keys that are out of the running.
        histogram = _histogram(
            tf.where(candidate, group * num_digits + digit, -1) + 1,
            num_groups * num_digits + 1,
        )[1:]
        histogram = tf.reshape(histogram, [num_groups, num_digits])
        at_least = tf.cumsum(histogram, axis=1, reverse=True)
        reached = tf.cast(at_least >= remaining[:, tf.newaxis], tf.int32)
        digit = tf.reduce_sum(reached, axis=1) - 1
        above = tf.gather(at_least - histogram, digit, axis=1, batch_dims=1)
        prefix = prefix * num_digits + tf.cast(digit, keys.dtype)
        return shift - digit_bits, prefix, remaining - above

    top_shift = (key_bits - 1) // digit_bits * digit_bits
    _, threshold, num_ties = tf.while_loop(
        lambda shift, *_: shift >= 0,
        next_digit,
        (
            tf.constant(top_shift, keys.dtype),
            tf.zeros([num_groups], keys.dtype),
            tf.constant(ks, tf.int32),
        ),
    )
    return threshold, num_ties


def _positions_of_bits(words, count):
    """`(word, bit)` of each of the `count` set bits, in rising order."""
    bits_before = tf.cumsum(_count_bits(words), exclusive=True)
    # Bit r lies in the last word that has at most r bits before it.
    word = tf.cumsum(_histogram(bits_before, count)) - 1
    rank = tf.range(count) - tf.gather(bits_before, word)
    return word, _position_of_bit(tf.gather(words, word), rank)


def _position_of_bit(words, rank):
    """Position, from the lowest, of the set bit number `rank` of each word."""
    position = tf.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = _count_bits(words & tf.constant((1 << half) - 1, tf.uint32))
        in_high_half = rank >= low
        rank = tf.where(in_high_half, rank - low, rank)
        position = tf.where(in_high_half, position + half, position)
        words = tf.where(
            in_high_half,
            tf.bitwise.right_shift(words, tf.constant(half, tf.uint32)),
            words,
        )
    return position


def _lowest_bits(words, count):
    """Each word with only its `count` lowest set bits kept (none if <= 0)."""
    one = tf.constant(1, tf.uint32)
    first_dropped = _position_of_bit(words, tf.maximum(count, 0))
    below = tf.bitwise.left_shift(one, tf.cast(first_dropped, tf.uint32)) - one
    return tf.where(count >= _count_bits(words), words, words & below)


def _pack_bits(mask):
    """Bool tensor `[words, 32]` to uint32 `[words]`, lowest bit first."""
    weights = tf.constant([1 << bit for bit in range(_WORD)], tf.uint32)
    return tf.reduce_sum(
        tf.where(mask, weights, tf.constant(0, tf.uint32)), axis=1
    )


def _count_bits(words):
    return tf.cast(tf.raw_ops.PopulationCount(x=words), tf.int32)


def _histogram(values, num_bins):
    """Counts of 0 .. `num_bins` - 1 in `values`; larger values are ignored."""
    # XLA compiles the raw op, and not tf.math.bincount.
    return tf.raw_ops.DenseBincount(
        input=tf.reshape(values, [-1]),
        size=num_bins,
        weights=tf.zeros([0], tf.int32),
        binary_output=False,
    )
