"""Exact selection of the k largest scores, in a form that XLA compiles.

`tf.math.top_k` is not used, because XLA's program for the CPU returns wrong
entries for some sizes (TensorFlow 2.21), breaks no ties by position, and is
many times slower (benchmarks/kernels/selection.py).
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import bitmap
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ranges
from tf_regtopk.selection import group_sampling
from tf_regtopk.selection import keys as keys_lib
from tf_regtopk.selection import kth_largest
from tf_regtopk.selection import sampling

Group = keys_lib.Group

# Fewer scores (of all groups) are not sampled, because sampling costs more than
# it saves there.
_SMALLEST_SAMPLED = 1 << 17
# Only so many keys exist at a time where all scores are searched, because an
# array of all keys takes memory.
_CHUNK = 1 << 20


def select_largest(
    scores: tf.Tensor, groups: Sequence[Group], step: int | tf.Tensor = 0
) -> tf.Tensor:
    r"""Returns the positions of the k scores of largest magnitude, by group.

    With `T` the k-th largest magnitude of a group, every entry above `T` is
    selected, and among the entries equal to `T` the ones with the lowest
    positions, so that exactly k entries are selected and every run and every
    replica agrees:

        s = {j : |score_j| > T}  +  the first k - |{j : |score_j| > T}| of
                                    {j : |score_j| = T}

    Magnitudes are compared by their bit patterns, which have the order of the
    values. Denormal numbers keep their order (unless the program that computed
    the scores has flushed them to 0); NaN counts as larger than any number.

    Args:
        scores: float32 or float64 tensor of shape `[J]`.
        groups: Sequence of `Group` whose sizes add up to J.
        step: Scalar integer that changes the scores that are sampled to save
            time, and never the result.

    Returns:
        int32 tensor of shape `[sum of k]`: positions in `scores`, rising.

    Example:

    >>> scores = tf.constant([0.5, -3.0, 0.1, 3.0, 2.0])
    >>> select_largest(scores, [Group(size=5, k=2)]).numpy().tolist()
    [1, 3]
    >>> select_largest(scores, [Group(3, 1), Group(2, 1)]).numpy().tolist()
    [1, 3]
    """
    if all(group.k == group.size for group in groups):
        return ranges.range_from(ranges.opaque_zero(step), scores.shape[0])
    candidates = _sample(scores, groups, step)
    if isinstance(candidates, group_sampling.GroupCandidates):
        return _select_few_of_each(scores, groups, candidates)
    if isinstance(candidates, sampling.Candidates):
        [group] = groups
        select = _select_few if candidates.sure is None else _select_many
        return select(scores, group, candidates)
    return _select(keys_lib.order_preserving(scores), groups)


def sample_suffices(
    scores: tf.Tensor, groups: Sequence[Group], step: int | tf.Tensor = 0
) -> tf.Tensor:
    """Returns whether `select_largest` finds all entries by its sample.

    If not, it looks at all scores several times, which takes longer and has the
    same result.

    Args:
        scores: As of `select_largest`.
        groups: As of `select_largest`.
        step: As of `select_largest`.

    Returns:
        Scalar bool tensor; True where nothing is sampled.

    Example:

    >>> bool(sample_suffices(tf.constant([0.5, -3.0]), [Group(2, 1)]))
    True
    """
    candidates = _sample(scores, groups, step)
    return tf.constant(True) if candidates is None else candidates.suffice


def _sample(
    scores: tf.Tensor, groups: Sequence[Group], step: int | tf.Tensor
) -> sampling.Candidates | group_sampling.GroupCandidates | None:
    """Rules out most scores by a sample, None where that would not pay."""
    if (
        all(group.k == group.size for group in groups)
        or scores.shape[0] < _SMALLEST_SAMPLED
    ):
        return None
    if len(groups) == 1:
        return sampling.candidates(scores, groups[0], step)
    return group_sampling.candidates(scores, groups, step)


def take(a: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Returns the entries of `a` at the positions that were selected.

    Args:
        a: Tensor `[J]`.
        indices: int32 tensor `[k]`, from `select_largest`.

    Returns:
        Tensor `[k]`.

    Example:

    >>> take(tf.constant([0.5, -3.0, 0.1]), tf.constant([1, 2])).numpy()
    array([-3. ,  0.1], dtype=float32)
    """
    return a if indices.shape == a.shape else tf.gather(a, indices)


def _select_few(
    scores: tf.Tensor, group: Group, candidates: sampling.Candidates
) -> tf.Tensor:
    """Selects the k largest of candidates that are few more than k."""
    k, room = group.k, candidates.room
    words, num_candidates = tf.cond(
        candidates.suffice,
        lambda: (candidates.undecided, candidates.num_undecided),
        lambda: (_mark_largest_of_many(scores, k), k),
    )
    positions, keys = _keys_at(scores, words, num_candidates, room)
    marked = keys_lib.mark_largest(keys_lib.in_rows(keys, [room]), [k])
    return bitmap.compact(marked, positions, k)


def _select_many(
    scores: tf.Tensor, group: Group, candidates: sampling.Candidates
) -> tf.Tensor:
    """Selects all sure candidates, and the largest of the undecided ones."""
    k, room = group.k, candidates.room

    def mark_largest_candidates() -> tf.Tensor:
        positions, keys = _keys_at(
            scores, candidates.undecided, candidates.num_undecided, room
        )
        marked = keys_lib.mark_largest(
            keys_lib.in_rows(keys, [room]), [k - candidates.num_sure]
        )
        return candidates.sure | bitmap.of_positions(
            positions,
            candidates.undecided.shape[0],
            tf.reshape(bitmap.unpack(marked), [-1]),
        )

    words = tf.cond(
        candidates.suffice,
        mark_largest_candidates,
        lambda: _mark_largest_of_many(scores, k),
    )
    return bitmap.positions(words, k)


def _select_few_of_each(
    scores: tf.Tensor,
    groups: Sequence[Group],
    candidates: group_sampling.GroupCandidates,
) -> tf.Tensor:
    """Selects the k largest of each group, if possible of the candidates."""
    ks = [group.k for group in groups]
    return tf.cond(
        candidates.suffice,
        lambda: _select_candidates(scores, ks, candidates),
        lambda: _select(keys_lib.order_preserving(scores), groups),
    )


def _select_candidates(
    scores: tf.Tensor,
    ks: Sequence[int],
    candidates: group_sampling.GroupCandidates,
) -> tf.Tensor:
    """Selects the k largest of each group of candidates that suffice."""
    room = candidates.room
    positions, keys = _keys_at(
        scores, candidates.words, candidates.number, room
    )
    # The groups are runs, because candidates are in the order of their groups.
    first = candidates.first
    group = bitmap.run_of_each(first[1:], room)
    threshold, num_ties = kth_largest.kth_largest(
        lambda shift, prefix: kth_largest.digit_histogram(
            keys, group, shift, prefix, keys_lib.NARROW_DIGIT
        ),
        ks,
        keys.dtype,
        keys_lib.NARROW_DIGIT,
    )
    threshold = tf.gather(threshold, group)
    is_tie = keys == threshold
    ties_before = _count_before(is_tie)
    end_of_ties = tf.gather(ties_before, first) + num_ties
    is_selected = (keys > threshold) | (
        is_tie & (ties_before < tf.gather(end_of_ties, group))
    )
    # A candidate that is not selected goes to a slot past the last.
    slot = tf.where(is_selected, _count_before(is_selected), sum(ks))
    return tf.tensor_scatter_nd_update(
        tf.zeros([sum(ks) + 1], tf.int32), slot[:, tf.newaxis], positions
    )[: sum(ks)]


def _count_before(mask: tf.Tensor) -> tf.Tensor:
    """Counts the true values before each place of a vector, as int32."""
    counts = tf.cast(mask, tf.int32)
    return bitmap.cumulative_sum(counts, largest=1) - counts


def _keys_at(
    scores: tf.Tensor, words: tf.Tensor, num_set: int | tf.Tensor, room: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns positions and keys of the set bits; keys past the last are -1."""
    positions = bitmap.positions(words, room)
    positions = tf.minimum(positions, scores.shape[0] - 1)
    keys = keys_lib.order_preserving(tf.gather(scores, positions))
    # The keys are cleared by a shift, because XLA compiles a tf.where here for
    # 1 s longer.
    room_left = -ranges.range_from(1 - num_set, room)
    keys |= tf.cast(tf.bitwise.right_shift(room_left, 31), keys.dtype)
    return positions, keys


def _mark_largest_of_many(scores: tf.Tensor, k: int) -> tf.Tensor:
    """Marks the k largest magnitudes, without an array of all keys."""
    if device_kind.is_gpu():
        threshold, num_ties = kth_largest.kth_largest_by_counting(
            keys_lib.order_preserving(scores), k
        )
    else:
        threshold, num_ties = _kth_largest_by_chunks(scores, k)
    larger, ties = keys_lib.pack_where(
        scores, lambda key: key > threshold, lambda key: key == threshold
    )
    return larger | keys_lib.first_bits(ties, tf.reshape(num_ties, [1]))


def _kth_largest_by_chunks(
    scores: tf.Tensor, k: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the k-th largest key, of a chunk of the scores at a time."""
    size = scores.shape[0]
    chunk = min(size, _CHUNK)
    digit_bits = keys_lib.WIDE_DIGIT

    def histogram_of(shift: tf.Tensor, prefix: tf.Tensor) -> tf.Tensor:
        def add_chunk(
            start: tf.Tensor, histogram: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            # Only new keys count, because the last chunk begins within the
            # chunk before.
            first = tf.minimum(start, size - chunk)
            keys = keys_lib.order_preserving(tf.slice(scores, [first], [chunk]))
            is_new = ranges.range_from(first, chunk) >= start
            return start + chunk, histogram + kth_largest.digit_histogram(
                tf.where(is_new, keys, -1), 0, shift, prefix, digit_bits
            )

        return tf.while_loop(
            # A negative start ends the loop, because an int32 may overflow
            # after the last chunk.
            lambda start, _: (start >= 0) & (start < size),
            add_chunk,
            (0, tf.zeros([1, 1 << digit_bits], tf.int32)),
        )[1]

    return kth_largest.kth_largest(
        histogram_of, [k], keys_lib.key_type(scores.dtype), digit_bits
    )


def _select(keys: tf.Tensor, groups: Sequence[Group]) -> tf.Tensor:
    """Selects the k largest integer keys of each group."""
    keys = keys_lib.in_rows(keys, [group.size for group in groups])
    ks = [group.k for group in groups]
    positions = bitmap.positions(keys_lib.mark_largest(keys, ks), sum(ks))
    first_entry = np.cumsum([0] + [g.size for g in groups[:-1]], dtype=np.int32)
    padding_before = keys.first_word * bitmap.WORD - first_entry
    if padding_before.any():
        group = tf.gather(keys.group_of_word, bitmap.word_of(positions))
        positions -= tf.gather(padding_before, group)
    return positions
