"""Sets of positions as bitmaps: 32 positions a word, lowest bit first.

In the form that XLA compiles to fast code: whole columns at a time, and no
scan, sort or scatter over more than one element a word.
"""

import numpy as np
import tensorflow as tf

from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import ranges

WORD = 32
# Bits are packed in squares of 32 words.
SQUARE = WORD * WORD
# Numbers in a row where rows are searched or summed, a power of 2.
_ROW = 16
# On GPUs of up to so many numbers, because a wider row takes fewer kernels.
_WIDE_ROW, _MOST_IN_WIDE_ROWS = 64, 1 << 19
# Up to so many are summed there by comparing all places with each other.
_MOST_COMPARED = 1 << 13
BITS = np.arange(WORD, dtype=np.uint32)


def pack(*masks):
    """Packs bool tensors of `[n]` entries into bitmaps.

    Args:
        *masks: Each a bool tensor, or a list of several that follow each other,
            of any shapes with a multiple of 1024 entries.

    Returns:
        For each a uint32 tensor `[n / 32]`.

    Example:

    >>> [words] = pack(tf.range(1024) >= 1022)
    >>> hex(words[-1].numpy())
    '0xc0000000'
    """
    weights = tf.constant([1 << bit for bit in range(WORD)], tf.uint32)
    # A CPU has vector code for sums down the columns of squares, and none for
    # sums along rows.  That makes the square's columns words.
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


def _size(mask):
    return sum(part.shape.num_elements() for part in tf.nest.flatten(mask))


def _transpose(squares):
    """Transposes squares of 32 x 32 bits, `[n, 32]` words.

    Bit c of word r of the result is bit r of word c.
    """
    bit = tf.constant(BITS)
    # Once more a sum down columns, and one pass; to swap quarters of ever
    # smaller squares takes five.
    bits = tf.bitwise.bitwise_and(
        tf.bitwise.right_shift(squares[:, :, tf.newaxis], bit),
        tf.constant(1, tf.uint32),
    )
    return tf.reduce_sum(
        tf.bitwise.left_shift(bits, bit[:, tf.newaxis]), axis=1
    )


def count_bits(words):
    """Number of set bits of each word, int32."""
    return tf.cast(tf.raw_ops.PopulationCount(x=words), tf.int32)


def bits_before(words):
    """Number of set bits in the words before each word, int32."""
    counts = count_bits(words)
    return cumulative_sum(counts, largest=WORD) - counts


def set_bits_before(words):
    """How many bits of its word are set before each bit: int32 `[n, 32]`."""
    one = tf.constant(1, tf.uint32)
    below = tf.bitwise.left_shift(one, BITS) - one
    return count_bits(words[:, tf.newaxis] & below)


def positions(words, num_set):
    """Positions of the first `num_set` set bits, int32, rising.

    If fewer bits are set, the rest of the positions means nothing.

    Example:

    >>> positions(tf.constant([5, 0, 1], tf.uint32), 3).numpy().tolist()
    [0, 2, 64]
    """
    # Where most words are empty, better search whole rows of them first. (A GPU
    # reads a row at once.)
    words_a_row = 1 if device_kind.is_gpu() else 8
    in_row = _ROW if words_a_row * num_set < words.shape[0] else 1
    num_rows = -(-words.shape[0] // in_row)
    if device_kind.is_gpu():
        # To whole rows of `cumulative_sum`, whose own padding takes a kernel.
        num_rows += -num_rows % _row_of(num_rows)
    padded = tf.pad(words, [[0, num_rows * in_row - words.shape[0]]])
    rows = tf.reshape(padded, [-1, in_row])
    counts = tf.reduce_sum(count_bits(rows), axis=1)
    before = cumulative_sum(counts, largest=in_row * WORD) - counts
    # Bit r lies in the last row that has at most r bits before it.
    row = cumulative_sum(histogram(before, num_set)) - 1
    # `before[0]` is 0.
    rank = ranges.range_from(before[0], num_set) - tf.gather(before, row)
    word, rank, words = _word_in_row(tf.gather(rows, row), rank)
    word += row * in_row
    return word * WORD + _position_in_word(words, rank)


def _word_in_row(rows, rank):
    """Which word of a row has its set bit number `rank`, and as which one."""
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


def _position_in_word(words, rank):
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


def lowest(words, num_kept):
    """Each word with only its `num_kept` lowest set bits (none if <= 0).

    Example:

    >>> lowest(tf.constant([7, 7], tf.uint32), tf.constant([2, -1])).numpy()
    array([3, 0], dtype=uint32)
    """
    one = tf.constant(1, tf.uint32)
    first_dropped = _position_in_word(words, tf.maximum(num_kept, 0))
    below = tf.bitwise.left_shift(one, tf.cast(first_dropped, tf.uint32)) - one
    return tf.where(num_kept >= count_bits(words), words, words & below)


def compact(words, values, num_set):
    """The values whose bits are set, in their order.

    Args:
        words: uint32 tensor `[n]`, in which `num_set` bits are set.
        values: int32 tensor `[32 n]`.
        num_set: Python integer.

    Returns:
        int32 tensor `[num_set]`.

    Example:

    >>> words = tf.constant([6], tf.uint32)
    >>> compact(words, tf.range(100, 132), 2).numpy().tolist()
    [101, 102]
    """
    one = tf.constant(1, tf.uint32)
    slot = bits_before(words)[:, tf.newaxis] + set_bits_before(words)
    # What is not set goes to a slot past the last.
    slot = tf.where(unpack(words) == one, slot, num_set)
    return tf.tensor_scatter_nd_update(
        tf.zeros([num_set + 1], values.dtype),
        tf.reshape(slot, [-1, 1]),
        values,
    )[:num_set]


def of_positions(positions, num_words, is_set=None):
    """The bitmap of some positions.

    Args:
        positions: int32 tensor `[n]`, in which each that is set occurs once.
        num_words: Length of the bitmap, Python integer.
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


def word_of(positions):
    """The word that each position lies in."""
    return tf.bitwise.right_shift(positions, WORD.bit_length() - 1)


def unpack(words):
    """The bits of each word, 0 or 1: uint32 tensor `[n, 32]`."""
    return tf.bitwise.right_shift(words[:, tf.newaxis], BITS) & tf.constant(
        1, tf.uint32
    )


def histogram(values, num_bins):
    """Counts of 0 .. `num_bins` - 1 in `values`; larger values are ignored."""
    # XLA compiles the raw op, and not tf.math.bincount.
    return tf.raw_ops.DenseBincount(
        input=tf.reshape(values, [-1]),
        size=num_bins,
        weights=tf.zeros([0], tf.int32),
        binary_output=False,
    )


def run_of_each(starts, size):
    """Which of consecutive runs each of `size` places lies in.

    Args:
        starts: int32 tensor, where the runs after the first one start, rising.
            (If XLA knows them, the result becomes a literal of the program.)
        size: Python integer.

    Returns:
        int32 tensor `[size]`.

    Example:

    >>> run_of_each(tf.constant([2, 3]), 5).numpy()
    array([0, 0, 1, 2, 2], dtype=int32)
    """
    return cumulative_sum(histogram(starts, size))


def cumulative_sum(values, largest=None):
    """`tf.cumsum` of an int32 vector, in short rows.

    As products with a triangular matrix, which XLA computes several times as
    fast as a scan, and faster still in floats.

    Args:
        values: int32 tensor `[n]`, none negative.
        largest: Python integer that no value exceeds, if one is known.

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
    # Up to here products are exact even where they are rounded to bfloat16.
    is_small = largest is not None and largest <= 256
    # On a GPU floats gain nothing, and a library would have to be started.
    dtype = tf.float32 if is_small and not is_gpu else tf.int32
    row = _row_of(size)
    triangle = tf.constant(np.triu(np.ones([row, row])), dtype)
    rows = tf.reshape(tf.pad(values, [[0, -size % row]]), [-1, row])
    in_row = tf.cast(tf.cast(rows, dtype) @ triangle, tf.int32)
    row_sums = in_row[:, -1]
    before = cumulative_sum(row_sums) - row_sums
    return tf.reshape(in_row + before[:, tf.newaxis], [-1])[:size]


def _row_of(size):
    """How many of `size` numbers are summed in a row."""
    is_wide = device_kind.is_gpu() and size <= _MOST_IN_WIDE_ROWS
    return _WIDE_ROW if is_wide else _ROW


def _sums_by_comparison(values):
    """As `cumulative_sum`: one short kernel on a GPU."""
    size = values.shape[0]
    place = tf.range(size)
    # The comparison must depend on an input, because TensorFlow would store the
    # whole matrix as a literal.
    last = place + ranges.opaque_zero(values[0])
    is_up_to = place <= last[:, tf.newaxis]
    return tf.reduce_sum(tf.where(is_up_to, values, 0), axis=1)
