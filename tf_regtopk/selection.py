"""Exact selection of the k largest scores, in a form that XLA compiles.

`tf.math.top_k` is not used: compiled by XLA for the CPU it returns wrong
entries for some sizes (TensorFlow 2.21), it breaks no ties by position, and it
is many times slower (benchmarks/selection.py).
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk import bitmap
from tf_regtopk import hashing

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
    r"""Returns the positions of the k scores of largest magnitude, by group.

    With `T` the k-th largest magnitude of a group, every entry above `T` is
    selected, and of those equal to `T` the ones with the lowest positions, so
    that exactly k are selected and every run and every replica agrees:

        s = {j : |score_j| > T}  +  the first k - |{j : |score_j| > T}| of
                                    {j : |score_j| = T}

    Magnitudes are compared by their bit patterns, which order them as their
    values do. Denormal numbers keep their order (unless what computed the
    scores has flushed them to 0); NaN counts as larger than any number.

    Args:
        scores: float32 or float64 tensor of shape `[J]`.
        groups: Sequence of `Group` whose sizes add up to J.
        step: Integer, or scalar integer tensor. Changes which scores are
            sampled to save time, and never the result.

    Returns:
        int32 tensor of shape `[sum of k]`: positions in `scores`, rising.

    Example:

    >>> scores = tf.constant([0.5, -3.0, 0.1, 3.0, 2.0])
    >>> select_largest(scores, [Group(size=5, k=2)]).numpy().tolist()
    [1, 3]
    >>> select_largest(scores, [Group(3, 1), Group(2, 1)]).numpy().tolist()
    [1, 3]
    """
    if len(groups) == 1 and groups[0].size >= _SMALLEST_SAMPLED:
        return _select_among_candidates(scores, groups[0], step)
    return _select(_order_preserving_keys(scores), groups)


def _select_among_candidates(scores, group, step):
    r"""As `select_largest` for one large group, most of it ruled out early.

        bound      = the r-th largest of m sampled keys
        candidates = {j : key_j >= bound}, compacted in one pass over the scores

    The k largest keys are among the candidates whenever there are k of them; r
    is so far above its expectation m k / J that there nearly always are. If
    there are not, or more than there is room for (masses of ties), all keys are
    searched.
    """
    size, k = group
    num_samples, rank, room = _sampling_plan(size, k)
    if rank >= num_samples or room >= size:
        return _select(_order_preserving_keys(scores), [group])

    words = _pack_at_least(
        scores, _sampled_bound(scores, num_samples, rank, step)
    )
    num_candidates = tf.reduce_sum(bitmap.count_bits(words))

    # The branch sees the scores, and makes keys of its own: XLA would store all
    # keys to hand them to it.
    def search_all():
        keys = _order_preserving_keys(scores)
        return _mark_largest(_in_words(keys, [group]), [k]), k

    words, num_candidates = tf.cond(
        (num_candidates >= k) & (num_candidates <= room),
        lambda: (words, num_candidates),
        search_all,
    )
    positions = tf.minimum(bitmap.positions(words, room), size - 1)
    keys = _order_preserving_keys(tf.gather(scores, positions))
    # -1 past the last candidate. XLA compiles a tf.where here for 1 s longer.
    room_left = num_candidates - 1 - tf.range(room)
    keys |= tf.cast(tf.bitwise.right_shift(room_left, 31), keys.dtype)
    return tf.gather(positions, _select(keys, [Group(room, k)]))


def _sampling_plan(size, k):
    """`(m, r, room)`: samples, rank among them, most candidates to expect."""
    num_samples = min(max(size // 512, 1 << 14), 1 << 16) // 32 * 32
    # 4 standard deviations to either side of a Poisson count.
    expected = num_samples * k / size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 1)
    room = size / num_samples * (rank + 4 * math.sqrt(rank) + 1)
    return num_samples, rank, _round_up(math.ceil(room), bitmap.SQUARE)


def _sampled_bound(scores, num_samples, rank, step):
    """The key of the given rank among samples, one from each equal stretch.

    Where in its stretch a sample lies changes with the stretch and the step, so
    that the bound cannot keep missing a pattern in the scores.
    """
    stretch = scores.shape[0] // num_samples
    random = tf.bitwise.right_shift(
        hashing.hash_bits(num_samples, 0, step), tf.constant(16, tf.uint32)
    )
    offset = tf.bitwise.right_shift(
        tf.bitcast(random, tf.int32) * stretch, tf.constant(16, tf.int32)
    )
    samples = tf.gather(scores, tf.range(num_samples) * stretch + offset)
    keys = _in_words(
        _order_preserving_keys(samples), [Group(num_samples, rank)]
    )
    threshold, _ = _kth_largest(keys, [rank])
    return threshold[0]


def _pack_at_least(scores, bound):
    """Bitmap of the scores whose key is at least `bound`."""
    # Only the rest is padded: XLA would slow down the whole pass.
    rest = scores.shape[0] % bitmap.SQUARE
    parts = tf.split(scores, [scores.shape[0] - rest, rest])
    whole, rest = (_order_preserving_keys(part) >= bound for part in parts)
    rest = tf.pad(rest, [[0, -rest.shape[0] % bitmap.SQUARE]])
    return tf.concat(bitmap.pack(whole, rest), axis=0)


def _select(keys, groups):
    """As `select_largest`, for integer keys; negative ones do not take part."""
    keys = _in_words(keys, groups)
    ks = [group.k for group in groups]
    positions = bitmap.positions(_mark_largest(keys, ks), sum(ks))
    first_entry = np.cumsum([0] + [g.size for g in groups[:-1]], dtype=np.int32)
    padding_before = keys.first_word * bitmap.WORD - first_entry
    if padding_before.any():
        word = tf.bitwise.right_shift(positions, bitmap.WORD.bit_length() - 1)
        group = tf.gather(keys.group_of_word, word)
        positions -= tf.gather(padding_before, group)
    return positions


def _mark_largest(keys, ks):
    """Bitmap of the k largest keys of each group."""
    threshold, num_ties = _kth_largest(keys, ks)
    threshold = tf.gather(threshold, keys.group_of_word)[:, tf.newaxis]
    larger, ties = bitmap.pack(keys.rows > threshold, keys.rows == threshold)
    ties_before = bitmap.bits_before(ties)
    ties_before -= tf.gather(
        tf.gather(ties_before, keys.first_word), keys.group_of_word
    )
    ties_left = tf.gather(num_ties, keys.group_of_word) - ties_before
    return larger | bitmap.lowest(ties, ties_left)


class _Keys(NamedTuple):
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


def _in_words(keys, groups):
    num_words = [-(-group.size // bitmap.WORD) for group in groups]
    num_words[-1] += -sum(num_words) % bitmap.WORD
    parts = []
    for part, n in zip(
        tf.split(keys, [group.size for group in groups]), num_words, strict=True
    ):
        padding = n * bitmap.WORD - part.shape[0]
        parts += [part, tf.fill([padding], tf.constant(-1, keys.dtype))]
    group_of_word = [tf.fill([n], g) for g, n in enumerate(num_words)]
    return _Keys(
        rows=tf.reshape(tf.concat(parts, axis=0), [-1, bitmap.WORD]),
        group_of_word=tf.concat(group_of_word, axis=0)[
            : None if len(groups) > 1 else 1
        ],
        first_word=np.cumsum([0] + num_words[:-1], dtype=np.int32),
    )


def _order_preserving_keys(scores):
    """Non-negative integers in the order of the non-negative `scores`."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    # The mask clears the sign bit, which -0.0 and some NaNs carry.
    return tf.bitcast(scores, integer) & integer.max


def _kth_largest(keys, ks):
    """The k-th largest key of each group, by radix search from the top digit.

    Args:
        keys: `_Keys`; negative ones do not take part.
        ks: The k of each group.

    Returns:
        `(threshold, num_ties)`, both of shape `[groups]`: the k-th largest key,
        and how many of the keys equal to it belong to the k largest.
    """
    rows, num_groups = keys.rows, len(ks)
    # Wide digits take fewer passes; small and many groups take narrow ones,
    # because each group has a histogram of its own.
    narrow = num_groups > 1 or rows.shape.num_elements() < 1 << 16
    digit_bits = 8 if narrow else 16
    num_digits = 1 << digit_bits
    group = keys.group_of_word[:, tf.newaxis]

    def next_digit(shift, prefix, remaining):
        rest = tf.bitwise.right_shift(rows, shift)
        digit = tf.cast(rest & (num_digits - 1), tf.int32)
        rest = tf.bitwise.right_shift(rest, tf.constant(digit_bits, rows.dtype))
        candidate = (rest == tf.gather(prefix, group)) & (rows >= 0)
        num_bins = num_groups * num_digits
        histogram = bitmap.histogram(
            # Keys out of the running fall into no bin.
            tf.where(candidate, group * num_digits + digit, num_bins),
            num_bins,
        )
        up_to = bitmap.cumulative_sum(histogram)
        histogram, up_to = (
            tf.reshape(x, [num_groups, num_digits]) for x in (histogram, up_to)
        )
        at_least = up_to[:, -1:] - up_to + histogram
        reached = tf.cast(at_least >= remaining[:, tf.newaxis], tf.int32)
        digit = tf.reduce_sum(reached, axis=1) - 1
        above = tf.gather(at_least - histogram, digit, axis=1, batch_dims=1)
        prefix = prefix * num_digits + tf.cast(digit, rows.dtype)
        return shift - digit_bits, prefix, remaining - above

    key_bits = 8 * rows.dtype.size - 1
    top_shift = (key_bits - 1) // digit_bits * digit_bits
    _, threshold, num_ties = tf.while_loop(
        lambda shift, *_: shift >= 0,
        next_digit,
        (
            tf.constant(top_shift, rows.dtype),
            tf.zeros([num_groups], rows.dtype),
            tf.constant(ks, tf.int32),
        ),
    )
    return threshold, num_ties


def _round_up(n, multiple):
    return -(-n // multiple) * multiple
