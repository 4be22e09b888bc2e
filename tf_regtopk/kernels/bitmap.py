"""Sets of positions as bitmaps: 32 positions a word, lowest bit first.

The functions work on whole columns at a time, without a scan, sort or scatter
over more than one element per word, because XLA compiles that to fast code.
"""

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ranges

WORD = 32
# Bits are packed in squares of 32 words of 32 bits.
SQUARE = WORD * WORD
# Rows that are searched or summed have this many numbers, a power of 2.
_ROW = 16
# GPUs sum up to so many numbers in wider rows, because that takes fewer
# kernels.
_WIDE_ROW, _MOST_IN_WIDE_ROWS = 64, 1 << 19
# GPUs sum up to so many numbers by comparing all places with each other.
_MOST_COMPARED = 1 << 13
BITS = np.arange(WORD, dtype=np.uint32)


def pack(*masks: tf.Tensor | list[tf.Tensor]) -> list[tf.Tensor]:
    """Packs bool tensors of `[n]` entries into bitmaps.

    Args:
        *masks: Bool tensors, or lists of bool tensors that follow each other,
            of any shapes with a multiple of 1024 entries.

    Returns:
        List of a uint32 tensor `[n / 32]` for each mask.

    Example:

    >>> [words] = pack(tf.range(1024) >= 1022)
    >>> hex(words[-1].numpy())
    '0xc0000000'
    """
    weights = tf.constant([1 << bit for bit in range(WORD)], tf.uint32)
    # The columns of a square become words on a CPU, because it has vector code
    # for sums down columns, and none for sums along rows.
    is_by_row = device_kind.is_gpu()
    sums = [
        tf.reduce_sum(
            tf.where(
                tf.reshape(part, [-1, WORD, WORD]),
                weights if is_by_row else weights[:, tf.newaxis],
                tf.constant(0, tf.uint32),
            ),
            axis=2 if is_by_row else 1,
        )
        for part in tf.nest.flatten(masks)
    ]
    words = tf.concat(sums, axis=0)
    words = tf.reshape(words if is_by_row else _transpose(words), [-1])
    return tf.split(words, [_size(mask) // WORD for mask in masks])


def _size(mask: tf.Tensor | list[tf.Tensor]) -> int:
    return sum(part.shape.num_elements() for part in tf.nest.flatten(mask))


def _transpose(squares: tf.Tensor) -> tf.Tensor:
    """Transposes squares of 32 x 32 bits, `[n, 32]` words.

    Bit c of word r of the result is bit r of word c.
    """
    bit = tf.constant(BITS)
    # A sum down columns takes one pass; swapping quarters of ever smaller
    # squares takes five.
    bits = tf.bitwise.bitwise_and(
        tf.bitwise.right_shift(squares[:, :, tf.newaxis], bit),
        tf.constant(1, tf.uint32),
    )
    return tf.reduce_sum(
        tf.bitwise.left_shift(bits, bit[:, tf.newaxis]), axis=1
    )


def count_bits(words: tf.Tensor) -> tf.Tensor:
    """Number of set bits of each word, as int32 numbers."""
    return tf.cast(tf.raw_ops.PopulationCount(x=words), tf.int32)


def bits_before(words: tf.Tensor) -> tf.Tensor:
    """Number of set bits in the words before each word, as int32 numbers."""
    counts = count_bits(words)
    return cumulative_sum(counts, largest=WORD) - counts


def set_bits_before(words: tf.Tensor) -> tf.Tensor:
    """Number of set bits before each bit of a word, as int32 `[n, 32]`."""
    one = tf.constant(1, tf.uint32)
    below = tf.bitwise.left_shift(one, BITS) - one
    return count_bits(words[:, tf.newaxis] & below)


def positions(words: tf.Tensor, num_set: int) -> tf.Tensor:
    """Positions of the first `num_set` set bits, as rising int32 numbers.

    If fewer bits are set, the rest of the positions means nothing.

    Example:

    >>> positions(tf.constant([5, 0, 1], tf.uint32), 3).numpy().tolist()
    [0, 2, 64]
    """
    # Whole rows of words are searched first where most words are empty, because
    # that takes less time. (A GPU reads a row at once.)
    words_a_row = 1 if device_kind.is_gpu() else 8
    in_row = _ROW if words_a_row * num_set < words.shape[0] else 1
    num_rows = -(-words.shape[0] // in_row)
    if device_kind.is_gpu():
        # Rows are added up to whole rows of `cumulative_sum`, because its own
        # padding takes a kernel.
        num_rows += -num_rows % _row_of(num_rows)
    padded = tf.pad(words, [[0, num_rows * in_row - words.shape[0]]])
    rows = tf.reshape(padded, [-1, in_row])
    counts = tf.reduce_sum(count_bits(rows), axis=1)
    before = cumulative_sum(counts, largest=in_row * WORD) - counts
    # Bit r lies in the last row that has at most r bits before it.
    row = cumulative_sum(histogram(before, num_set)) - 1
    # A range from `before[0]` is no literal, because that 0 is computed.
    rank = ranges.range_from(before[0], num_set) - tf.gather(before, row)
    word, rank, words = _word_in_row(tf.gather(rows, row), rank)
    word += row * in_row
    return word * WORD + _position_in_word(words, rank)


def _word_in_row(
    rows: tf.Tensor, rank: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds the word of each row that has the row's set bit number `rank`.

    Returns:
        `(word, rank, words)`: the place of that word in its row, the rank of
        the bit in that word, and the word itself.
    """
    words = tf.unstack(rows, axis=1)
    word = tf.zeros_like(rank)
    while len(words) > 1:
        half = len(words) // 2
        low = tf.add_n([count_bits(w) for w in words[:half]])
        in_high_half = rank >= low
        rank = tf.where(in_high_half, rank - low, rank)
        word = tf.where(in_high_half, word + half, word)
        words = [
            tf.where(in_high_half, *pair)
            for pair in zip(words[half:], words[:half], strict=True)
        ]
    return word, rank, words[0]


def _position_in_word(words: tf.Tensor, rank: tf.Tensor) -> tf.Tensor:
    """Position of the set bit number `rank` of each word."""
    position = tf.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = count_bits(words & tf.constant((1 << half) - 1, tf.uint32))
        in_high_half = rank >= low
        rank = tf.where(in_high_half, rank - low, rank)
        position = tf.where(in_high_half, position + half, position)
        words = tf.where(
            in_high_half,
            tf.bitwise.right_shift(words, tf.constant(half, tf.uint32)),
            words,
        )
    return position


def lowest(words: tf.Tensor, num_kept: tf.Tensor) -> tf.Tensor:
    """Keeps the `num_kept` lowest set bits of each word (none if <= 0).

    Example:

    >>> lowest(tf.constant([7, 7], tf.uint32), tf.constant([2, -1])).numpy()
    array([3, 0], dtype=uint32)
    """
    one = tf.constant(1, tf.uint32)
    first_dropped = _position_in_word(words, tf.maximum(num_kept, 0))
    below = tf.bitwise.left_shift(one, tf.cast(first_dropped, tf.uint32)) - one
    return tf.where(num_kept >= count_bits(words), words, words & below)


def compact(words: tf.Tensor, values: tf.Tensor, num_set: int) -> tf.Tensor:
    """Selects the values whose bits are set, in their order.

    Args:
        words: uint32 tensor `[n]`, in which `num_set` bits are set.
        values: int32 tensor `[32 n]`.
        num_set: Number of set bits.

    Returns:
        int32 tensor `[num_set]`.

    Example:

    >>> words = tf.constant([6], tf.uint32)
    >>> compact(words, tf.range(100, 132), 2).numpy().tolist()
    [101, 102]
    """
    one = tf.constant(1, tf.uint32)
    slot = bits_before(words)[:, tf.newaxis] + set_bits_before(words)
    # Values whose bits are not set go to a slot past the last.
    slot = tf.where(unpack(words) == one, slot, num_set)
    return tf.tensor_scatter_nd_update(
        tf.zeros([num_set + 1], values.dtype),
        tf.reshape(slot, [-1, 1]),
        values,
    )[:num_set]


def of_positions(
    positions: tf.Tensor, num_words: int, is_set: tf.Tensor | None = None
) -> tf.Tensor:
    """Makes the bitmap of some positions.

    Args:
        positions: int32 tensor `[n]`; each set position occurs exactly once.
        num_words: Length of the bitmap.
        is_set: uint32 tensor `[n]`, 1 or 0. Defaults to all 1.

    Returns:
        uint32 tensor `[num_words]`.

    Example:

    >>> of_positions(tf.constant([0, 2, 64]), 3).numpy().tolist()
    [5, 0, 1]
    """
    if is_set is None:
        is_set = tf.ones_like(positions, tf.uint32)
    bit = tf.cast(positions & (WORD - 1), tf.uint32)
    return tf.tensor_scatter_nd_add(
        tf.zeros([num_words], tf.uint32),
        word_of(positions)[:, tf.newaxis],
        tf.bitwise.left_shift(is_set, bit),
    )


def word_of(positions: tf.Tensor) -> tf.Tensor:
    """Returns the number of the word that each position lies in."""
    return tf.bitwise.right_shift(positions, WORD.bit_length() - 1)


def unpack(words: tf.Tensor) -> tf.Tensor:
    """Unpacks the bits of each word, 0 or 1, into a uint32 tensor `[n, 32]`."""
    return tf.bitwise.right_shift(words[:, tf.newaxis], BITS) & tf.constant(
        1, tf.uint32
    )


def histogram(values: tf.Tensor, num_bins: int) -> tf.Tensor:
    """Counts 0 .. `num_bins` - 1 in `values`; larger values are ignored."""
    # The raw op is used because XLA does not compile tf.math.bincount.
    return tf.raw_ops.DenseBincount(
        input=tf.reshape(values, [-1]),
        size=num_bins,
        weights=tf.zeros([0], tf.int32),
        binary_output=False,
    )


def run_of_each(starts: tf.Tensor, size: int) -> tf.Tensor:
    """Numbers of the consecutive runs that `size` places lie in.

    Args:
        starts: int32 tensor, the rising starts of the runs after the first one,
            added to a `ranges.run_time_zero` if XLA could know them.
        size: Number of places.

    Returns:
        int32 tensor `[size]`.

    Example:

    >>> run_of_each(tf.constant([2, 3]), 5).numpy()
    array([0, 0, 1, 2, 2], dtype=int32)
    """
    return cumulative_sum(histogram(starts, size))


def cumulative_sum(values: tf.Tensor, largest: int | None = None) -> tf.Tensor:
    """Computes `tf.cumsum` of an int32 vector, in short rows.

    Rows are multiplied by a triangular matrix, because XLA computes these
    products several times as fast as a scan, and faster still in floats.

    Args:
        values: int32 tensor `[n]`, none negative.
        largest: Number that no value exceeds, if one is known.

    Returns:
        int32 tensor `[n]`.

    Example:

    >>> cumulative_sum(tf.constant([1, 2, 3])).numpy().tolist()
    [1, 3, 6]
    """
    size = values.shape[0]
    is_gpu = device_kind.is_gpu()
    if is_gpu and size <= _MOST_COMPARED:
        return _sums_by_comparison(values)
    if size <= 4 * _ROW:
        return tf.cumsum(values)
    # Products of values up to 256 are exact even if rounded to bfloat16.
    is_small = largest is not None and largest <= 256
    # A GPU sums integers, because there floats gain nothing and need a library.
    dtype = tf.float32 if is_small and not is_gpu else tf.int32
    row = _row_of(size)
    triangle = tf.constant(np.triu(np.ones([row, row])), dtype)
    rows = tf.reshape(tf.pad(values, [[0, -size % row]]), [-1, row])
    in_row = tf.cast(tf.cast(rows, dtype) @ triangle, tf.int32)
    row_sums = in_row[:, -1]
    before = cumulative_sum(row_sums) - row_sums
    return tf.reshape(in_row + before[:, tf.newaxis], [-1])[:size]


def _row_of(size: int) -> int:
    """Number of the `size` numbers that are summed in a row."""
    is_wide = device_kind.is_gpu() and size <= _MOST_IN_WIDE_ROWS
    return _WIDE_ROW if is_wide else _ROW


def _sums_by_comparison(values: tf.Tensor) -> tf.Tensor:
    """Computes `cumulative_sum` in one short kernel on a GPU."""
    size = values.shape[0]
    place = tf.range(size)
    # The comparison must depend on an input, because TensorFlow would store the
    # whole matrix as a literal.
    last = place + ranges.opaque_zero(values[0])
    is_up_to = place <= last[:, tf.newaxis]
    return tf.reduce_sum(tf.where(is_up_to, values, 0), axis=1)
