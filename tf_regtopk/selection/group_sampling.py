r"""Lower bounds on the k-th largest score of each of many groups.

`sampling` serves one large group. This module treats all groups in the same
passes, so that neither the number of operations nor the time to compile grows
with the number of groups. (Each group has its own bound; small groups have
none.)
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import hashing
from tf_regtopk.kernels import ranges
from tf_regtopk.selection import keys as keys_lib

# All entries of a smaller group are candidates.
_SMALLEST_SAMPLED = 1 << 13
_FEWEST_SAMPLES, _MOST_SAMPLES = 1 << 11, 1 << 16
# A bound is so many standard deviations away from k, more than for one group,
# because the bounds of all groups have to hold.
_MARGIN = 6.0
# At most one score of so many may remain a candidate, because with more of them
# ruling out the others does not pay (benchmarks/kernels/selection.py).
_CANDIDATES_PAY = 8


class Sample(NamedTuple):
    """The sample of a group.

    Args:
        size: m, the number of samples, a multiple of 32; 0 for no bound.
        rank: Rank of the lower bound among the samples, from 1.
    """

    size: int
    rank: int


class GroupPlan(NamedTuple):
    """The samples of all groups, and the number of candidates to expect.

    Args:
        samples: Tuple of a `Sample` for each group.
        room: Most scores to expect above their bounds.
    """

    samples: tuple[Sample, ...]
    room: int


class GroupCandidates(NamedTuple):
    """The scores that have not been ruled out.

    Args:
        words: Bitmap of the candidates' positions.
        number: Number of candidates.
        first: int32 tensor `[groups]`, the number of candidates in the groups
            before each group.
        suffice: True if the k largest scores of every group are candidates, and
            there are no more candidates than room.
        room: Most candidates to expect.
    """

    words: tf.Tensor
    number: tf.Tensor
    first: tf.Tensor
    suffice: tf.Tensor
    room: int


def plan(groups: Sequence[keys_lib.Group]) -> GroupPlan | None:
    """Makes the `GroupPlan` for some groups, None if no sample would pay."""
    samples, mean, variance = [], 0.0, 0.0
    for size, k in groups:
        m = min(max(size // 256, _FEWEST_SAMPLES), _MOST_SAMPLES)
        m = m // bitmap.WORD * bitmap.WORD
        expected = m * k / size
        rank = math.ceil(expected + _MARGIN * math.sqrt(expected) + 1)
        if size < _SMALLEST_SAMPLED or 2 * rank > m:
            samples.append(Sample(0, 0))
            mean += size
        else:
            samples.append(Sample(m, rank))
            # The variance is added up because the number of scores between two
            # samples varies as well.
            mean += rank * (size / m)
            variance += rank * (size / m) ** 2
    room = mean + _MARGIN * math.sqrt(variance)
    # Words that several groups share need more room, because all scores of such
    # a word are compared with the lowest bound, see `_bounds_of_words`.
    room = math.ceil(room + bitmap.WORD * len(groups))
    if _CANDIDATES_PAY * room > sum(group.size for group in groups):
        return None
    return GroupPlan(tuple(samples), room)


def candidates(
    scores: tf.Tensor, groups: Sequence[keys_lib.Group], step: int | tf.Tensor
) -> GroupCandidates | None:
    """Rules out most scores in one pass.

        candidates = {j : |score_j| >= lower_g},    g the group of j

    Args:
        scores: Float tensor `[J]`.
        groups: Sequence of `keys.Group`.
        step: Scalar integer that changes the samples.

    Returns:
        `GroupCandidates`, None if no sample would pay.
    """
    p = plan(groups)
    if p is None:
        return None
    starts = _starts([group.size for group in groups])
    bounds = _bounds(scores, groups, p.samples, step)
    words = _pack_at_least(
        scores, _bounds_of_words(bounds, starts, scores.shape[0], step)
    )
    before = bitmap.bits_before(words)
    number = before[-1] + bitmap.count_bits(words[-1])
    first = tf.gather(before, bitmap.word_of(starts)) + bitmap.count_bits(
        tf.gather(words, bitmap.word_of(starts)) & _bits_below(starts)
    )
    in_group = tf.concat([first[1:], [number]], axis=0) - first
    ks = tf.constant([group.k for group in groups])
    suffice = tf.reduce_all(in_group >= ks) & (number <= p.room)
    return GroupCandidates(words, number, first, suffice, p.room)


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Returns the starts of consecutive runs, an int32 array."""
    return np.cumsum([0, *sizes[:-1]], dtype=np.int32)


def _bits_below(positions: np.ndarray) -> np.ndarray:
    """Returns the bits below each position in its word, a uint32 array."""
    in_word = (positions % bitmap.WORD).astype(np.uint32)
    return (np.uint32(1) << in_word) - np.uint32(1)


def _bounds(
    scores: tf.Tensor,
    groups: Sequence[keys_lib.Group],
    samples: Sequence[Sample],
    step: int | tf.Tensor,
) -> tf.Tensor:
    """Finds the key of each group's lower bound, 0 for a group without samples.

    One sample lies in each stretch of its group, as in `sampling`.
    """
    sampled = np.array([g for g, sample in enumerate(samples) if sample.size])
    num_words = [samples[g].size // bitmap.WORD for g in sampled]
    first_word = _starts(num_words)
    row = np.repeat(np.arange(len(sampled), dtype=np.int32), num_words)
    stretch = np.array(
        [groups[g].size // samples[g].size for g in sampled], np.int32
    )[row]
    start = _starts([group.size for group in groups])[sampled][row]
    start += bitmap.WORD * (np.arange(len(row)) - first_word[row]) * stretch
    # Both become columns, because a row holds the samples of one word.
    start, stretch = start[:, np.newaxis], stretch[:, np.newaxis]
    random = tf.bitwise.right_shift(
        hashing.hash_bits(bitmap.WORD * len(row), 0, step),
        tf.constant(16, tf.uint32),
    )
    offset = tf.bitwise.right_shift(
        tf.reshape(tf.bitcast(random, tf.int32), [-1, bitmap.WORD]) * stretch,
        tf.constant(16, tf.int32),
    )
    positions = start + stretch * tf.range(bitmap.WORD) + offset
    keys = keys_lib.Keys(
        rows=keys_lib.order_preserving(tf.gather(scores, positions)),
        group_of_word=tf.constant(row),
        first_word=first_word,
    )
    bounds, _ = keys_lib.kth_largest(keys, [samples[g].rank for g in sampled])
    return tf.tensor_scatter_nd_update(
        tf.zeros([len(groups)], bounds.dtype), sampled[:, np.newaxis], bounds
    )


def _bounds_of_words(
    bounds: tf.Tensor, starts: np.ndarray, size: int, step: int | tf.Tensor
) -> tf.Tensor:
    """Returns the lowest bound of the groups in each word of 32 scores."""
    num_words = -(-size // bitmap.SQUARE) * bitmap.WORD
    # XLA must not know the starts, because it would store the groups of all
    # words in the executable.
    starts += ranges.run_time_zero(step)
    first_whole_word = bitmap.word_of(starts[1:] + (bitmap.WORD - 1))
    group = bitmap.run_of_each(first_whole_word, num_words)
    return tf.tensor_scatter_nd_min(
        tf.gather(bounds, group), bitmap.word_of(starts)[:, tf.newaxis], bounds
    )


def _pack_at_least(scores: tf.Tensor, bounds: tf.Tensor) -> tf.Tensor:
    """Packs a bitmap of the scores whose keys reach the bound of their word."""
    parts = [
        tf.reshape(part, [-1, bitmap.WORD])
        for part in keys_lib.in_squares(scores)
    ]
    bounds = tf.split(bounds, [part.shape[0] for part in parts])
    [words] = bitmap.pack(
        [
            part >= bound[:, tf.newaxis]
            for part, bound in zip(parts, bounds, strict=True)
        ]
    )
    return words
