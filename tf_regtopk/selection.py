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
from tf_regtopk import radix
from tf_regtopk import sequence

# Below this size, sampling costs more than it saves.
_SMALLEST_SAMPLED = 1 << 17
# Where all scores are searched, only so many keys exist at a time.
_CHUNK = 1 << 20
# Bits in a digit of the radix search.
_WIDE_DIGIT, _NARROW_DIGIT = 16, 8


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
    """As `select_largest` for one large group, most of it ruled out early."""
    size, k = group
    num_samples, rank, room = _sampling_plan(size, k)
    if rank >= num_samples or room >= size:
        return _select(_order_preserving_keys(scores), [group])
    words, num_candidates, suffices = sample_candidates(scores, group, step)

    words, num_candidates = tf.cond(
        suffices,
        lambda: (words, num_candidates),
        lambda: (_mark_largest_of_many(scores, k), k),
    )
    positions = tf.minimum(bitmap.positions(words, room), size - 1)
    keys = _order_preserving_keys(tf.gather(scores, positions))
    # -1 past the last candidate. XLA compiles a tf.where here for 1 s longer.
    room_left = -sequence.range_from(1 - num_candidates, room)
    keys |= tf.cast(tf.bitwise.right_shift(room_left, 31), keys.dtype)
    return tf.gather(positions, _select(keys, [Group(room, k)]))


def sample_candidates(scores, group, step):
    r"""Rules out most of a large group in one pass over its scores.

        bound      = the r-th largest of m sampled magnitudes
        candidates = {j : |score_j| >= bound}

    The k largest are among the candidates whenever there are k of them; r is so
    far above its expectation m k / J that there nearly always are.

    Args:
        scores: Float tensor `[J]`.
        group: `Group` of all J.
        step: Integer, or scalar integer tensor.

    Returns:
        `(words, num_candidates, suffices)`: the candidates as a bitmap, their
        number, and whether they are at least k and not more than there is room
        for (as with masses of ties). If they are not, all must be searched.
    """
    plan = _sampling_plan(*group)
    bound = _sampled_bound(scores, plan, step)
    [words] = _pack_where(scores, lambda key: key >= bound)
    num_candidates = tf.reduce_sum(bitmap.count_bits(words))
    suffices = (num_candidates >= group.k) & (num_candidates <= plan.room)
    return words, num_candidates, suffices


class _SamplingPlan(NamedTuple):
    """Number of samples m, rank r among them, most candidates to expect."""

    num_samples: int
    rank: int
    room: int


def _sampling_plan(size, k):
    num_samples = min(max(size // 256, 1 << 14), 1 << 16) // 32 * 32
    # 4 standard deviations to either side of a Poisson count.
    expected = num_samples * k / size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 1)
    room = size / num_samples * (rank + 4 * math.sqrt(rank) + 1)
    room = -(-math.ceil(room) // bitmap.SQUARE) * bitmap.SQUARE
    return _SamplingPlan(num_samples, rank, room)


def _sampled_bound(scores, plan, step):
    """The key of the given rank among samples, one from each equal stretch.

    Where in its stretch a sample lies changes with the stretch and the step, so
    that the bound cannot keep missing a pattern in the scores.
    """
    num_samples, rank, _ = plan
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


def _pack_where(scores, *conditions):
    """Bitmaps of the scores whose keys meet each condition."""
    # Only the rest is padded: XLA would slow down the whole pass.
    rest = scores.shape[0] % bitmap.SQUARE
    parts = tf.split(scores, [scores.shape[0] - rest, rest])
    padding = [[0, -rest % bitmap.SQUARE]]
    words = []
    for condition in conditions:
        whole, rest = (condition(_order_preserving_keys(p)) for p in parts)
        words += [whole, tf.pad(rest, padding)]
    words = bitmap.pack(*words)
    return [
        tf.concat(pair, axis=0)
        for pair in zip(words[::2], words[1::2], strict=True)
    ]


def _mark_largest_of_many(scores, k):
    """Bitmap of the k largest magnitudes, without an array of all keys."""
    size = scores.shape[0]
    chunk = min(size, _CHUNK)

    def histogram_of(shift, prefix):
        def add_chunk(start, histogram):
            # The last chunk begins within the one before.
            first = tf.minimum(start, size - chunk)
            keys = _order_preserving_keys(tf.slice(scores, [first], [chunk]))
            is_new = sequence.range_from(first, chunk) >= start
            return start + chunk, histogram + radix.digit_histogram(
                tf.where(is_new, keys, -1), 0, shift, prefix, _WIDE_DIGIT
            )

        return tf.while_loop(
            # An int32 may have overflowed after the last chunk.
            lambda start, _: (start >= 0) & (start < size),
            add_chunk,
            (0, tf.zeros([1, 1 << _WIDE_DIGIT], tf.int32)),
        )[1]

    threshold, num_ties = radix.kth_largest(
        histogram_of, [k], _key_type(scores.dtype), _WIDE_DIGIT
    )
    larger, ties = _pack_where(
        scores, lambda key: key > threshold, lambda key: key == threshold
    )
    return larger | bitmap.lowest(ties, num_ties - bitmap.bits_before(ties))


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


def _kth_largest(keys, ks):
    """As `radix.kth_largest`, of `_Keys`; negative ones do not take part."""
    rows, group = keys.rows, keys.group_of_word[:, tf.newaxis]
    # Wide digits take fewer passes; small and many groups take narrow ones,
    # because each group has a histogram of its own.
    is_large = len(ks) == 1 and rows.shape.num_elements() >= 1 << _WIDE_DIGIT
    digit_bits = _WIDE_DIGIT if is_large else _NARROW_DIGIT
    return radix.kth_largest(
        lambda shift, prefix: radix.digit_histogram(
            rows, group, shift, prefix, digit_bits
        ),
        ks,
        rows.dtype,
        digit_bits,
    )


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
    """Non-negative integers in the order of the magnitudes of `scores`."""
    integer = _key_type(scores.dtype)
    # The mask clears the sign bit.
    return tf.bitcast(scores, integer) & integer.max


def _key_type(dtype):
    return tf.int64 if dtype == tf.float64 else tf.int32
