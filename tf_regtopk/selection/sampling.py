r"""Bounds on the k-th largest score from a sample of the scores.

With m samples of J scores, about m k / J samples are among the k largest, give
or take the square root of that number. So the sample whose rank is well above
that number is nearly always a lower bound on the k-th largest score, and the
sample whose rank is well below is an upper bound. Either may fail; then all
scores must be searched.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import hashing
from tf_regtopk.selection import keys as keys_lib

# A bound is so many standard deviations (of a Poisson count) away from k.
_MARGIN = 4.0
# An upper bound is drawn as well above this density, because it costs less time
# than refining all candidates (benchmarks/kernels/selection.py).
_HIGH_DENSITY = 1 / 32


class Plan(NamedTuple):
    """The sample, its bounds, and the number of candidates to expect.

    Args:
        num_samples: m.
        lower_rank: Rank of the lower bound among the samples, from 1.
        upper_rank: Rank of the upper bound; 0 if none is to be drawn.
        room: Most scores to expect between the bounds.
    """

    num_samples: int
    lower_rank: int
    upper_rank: int
    room: int


class Candidates(NamedTuple):
    """The scores that have not been ruled out, as bitmaps of their positions.

    Args:
        sure: Scores that reach the upper bound; None if there is no such bound.
        num_sure: Number of sure scores.
        undecided: Scores from the lower to below the upper bound.
        num_undecided: Number of undecided scores.
        suffice: True if the k-th largest score is undecided, and there are no
            more undecided scores than room (masses of ties exceed it).
        room: Most undecided scores to expect.
    """

    sure: tf.Tensor | None
    num_sure: tf.Tensor
    undecided: tf.Tensor
    num_undecided: tf.Tensor
    suffice: tf.Tensor
    room: int


def plan(size: int, k: int) -> Plan | None:
    """Makes the `Plan` for k of `size` scores, None if no sample would pay."""
    num_samples = min(max(size // 256, 1 << 14), 1 << 16) // 32 * 32
    if num_samples > size:
        return None
    expected = num_samples * k / size
    margin = _MARGIN * math.sqrt(expected) + 1
    lower_rank = math.ceil(expected + margin)
    upper_rank = 0
    if k > _HIGH_DENSITY * size:
        upper_rank = max(0, math.floor(expected - margin))
    # The room has a margin because the number of scores between two samples
    # varies as well.
    num_undecided = lower_rank - upper_rank
    room = num_undecided + _MARGIN * math.sqrt(num_undecided) + 1
    room = -(-math.ceil(size / num_samples * room) // bitmap.SQUARE)
    room *= bitmap.SQUARE
    if lower_rank >= num_samples or room >= size:
        return None
    return Plan(num_samples, lower_rank, upper_rank, room)


def candidates(
    scores: tf.Tensor, group: keys_lib.Group, step: int | tf.Tensor
) -> Candidates | None:
    """Rules out most of a large group in one pass over its scores.

        sure      = {j : |score_j| >= upper}
        undecided = {j : upper > |score_j| >= lower}

    Args:
        scores: Float tensor `[J]`.
        group: `keys.Group` of all J scores.
        step: Scalar integer that changes the sample.

    Returns:
        `Candidates`, None if no sample would pay.
    """
    p = plan(*group)
    if p is None:
        return None
    lower, upper = _bounds(scores, p, step)
    if p.upper_rank:
        sure, undecided = keys_lib.pack_where(
            scores,
            lambda key: key >= upper,
            lambda key: (key >= lower) & (key < upper),
        )
        num_sure = tf.reduce_sum(bitmap.count_bits(sure))
    else:
        sure, num_sure = None, tf.constant(0)
        [undecided] = keys_lib.pack_where(scores, lambda key: key >= lower)
    num_undecided = tf.reduce_sum(bitmap.count_bits(undecided))
    suffice = (
        (num_sure < group.k)
        & (group.k <= num_sure + num_undecided)
        & (num_undecided <= p.room)
    )
    return Candidates(sure, num_sure, undecided, num_undecided, suffice, p.room)


def _bounds(
    scores: tf.Tensor, p: Plan, step: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Finds the keys of the planned ranks among samples, one from each stretch.

    The place of a sample in its stretch changes with the stretch and the step,
    so that the bounds cannot keep missing a pattern in the scores.
    """
    stretch = scores.shape[0] // p.num_samples
    random = tf.bitwise.right_shift(
        hashing.hash_bits(p.num_samples, 0, step), tf.constant(16, tf.uint32)
    )
    offset = tf.bitwise.right_shift(
        tf.bitcast(random, tf.int32) * stretch, tf.constant(16, tf.int32)
    )
    samples = tf.gather(scores, tf.range(p.num_samples) * stretch + offset)
    keys = keys_lib.in_rows(keys_lib.order_preserving(samples), [p.num_samples])

    # GPUs search only the upper half of a key, because that makes a good enough
    # bound. (Scores that all have the same upper half are all searched.)
    num_bits = 4 * keys.rows.dtype.size + 2

    def bound(rank: int) -> tf.Tensor:
        return keys_lib.kth_largest(keys, [rank], num_bits)[0][0]

    return bound(p.lower_rank), bound(p.upper_rank) if p.upper_rank else None
