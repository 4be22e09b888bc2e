"""The k-th largest of many integers, by radix search from the top digit."""

from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf

from tf_regtopk.kernels import bitmap

# A digit that is found by counting has as many bits as keep the comparisons of
# a round below this, within these limits, because longer digits take fewer
# rounds.
_COMPARISONS = 1 << 26
_FEWEST_COUNTED, _MOST_COUNTED = 4, 9
# Keys are counted in so many parts, each part in one go.
_PARTS = 32


def kth_largest(
    histogram_of: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    ks: Sequence[int | tf.Tensor],
    dtype: tf.DType,
    digit_bits: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the k-th largest key of each group.

    Args:
        histogram_of: Function of a position `shift` and of the higher bits
            `prefix` of each group's result. Returns the `digit_histogram` of
            all keys.
        ks: The k of each group, integers or scalar int32 tensors.
        dtype: int32 or int64, the dtype of the keys.
        digit_bits: Number of bits to find at a time.

    Returns:
        `(threshold, num_ties)`, both of shape `[groups]`: the k-th largest key,
        and the number of keys equal to it that belong to the k largest.
    """

    def next_digit(
        shift: tf.Tensor, prefix: tf.Tensor, remaining: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        histogram = histogram_of(shift, prefix)
        up_to = tf.reshape(
            bitmap.cumulative_sum(tf.reshape(histogram, [-1])), histogram.shape
        )
        at_least = up_to[:, -1:] - up_to + histogram
        reached = tf.cast(at_least >= remaining[:, tf.newaxis], tf.int32)
        digit = tf.reduce_sum(reached, axis=1) - 1
        above = tf.gather(at_least - histogram, digit, axis=1, batch_dims=1)
        prefix = tf.bitwise.left_shift(prefix, tf.constant(digit_bits, dtype))
        return (
            shift - digit_bits,
            prefix | tf.cast(digit, dtype),
            (remaining - above),
        )

    key_bits = 8 * dtype.size - 1
    top_shift = (key_bits - 1) // digit_bits * digit_bits
    _, threshold, num_ties = tf.while_loop(
        lambda shift, *_: shift >= 0,
        next_digit,
        (
            tf.constant(top_shift, dtype),
            tf.zeros([len(ks)], dtype),
            tf.convert_to_tensor(ks, tf.int32),
        ),
    )
    return threshold, num_ties


def kth_largest_by_counting(
    keys: tf.Tensor, k: int | tf.Tensor, num_bits: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the k-th largest key of one group, in the form that suits GPUs.

    The keys that reach each of several thresholds are counted at once, because
    that reads keys as fast as memory gives them. In a histogram most keys would
    fall into few bins, and wait for each other there.

    Args:
        keys: Integer tensor of any shape; negative keys do not take part.
        k: Integer or scalar int32 tensor.
        num_bits: Number of the highest bits of the threshold to find, if a
            lower bound on the threshold is enough. Defaults to all bits.

    Returns:
        `(threshold, num_ties)` of `kth_largest`, as scalars.

    Example:

    >>> threshold, num_ties = kth_largest_by_counting(tf.constant([3, 9, 9]), 1)
    >>> int(threshold), int(num_ties)
    (9, 1)
    """
    dtype, num_keys = keys.dtype, keys.shape.num_elements()
    parts = _PARTS if num_keys % _PARTS == 0 else 1
    keys = tf.reshape(keys, [1, parts, -1])
    key_bits = 8 * dtype.size - 1
    num_bits = num_bits or key_bits
    digit_bits = (_COMPARISONS // num_keys).bit_length() - 1
    digit_bits = min(max(digit_bits, _FEWEST_COUNTED), _MOST_COUNTED)
    num_rounds = -(-num_bits // digit_bits)
    threshold, larger = tf.constant(0, dtype), tf.constant(0)
    above = key_bits
    # The loop is unrolled, because each round is only two short kernels.
    for i in range(1, num_rounds + 1):
        shift = key_bits - num_bits * i // num_rounds
        digits = tf.range(1, 1 << (above - shift), dtype=dtype)
        thresholds = threshold | tf.bitwise.left_shift(
            digits, tf.constant(shift, dtype)
        )
        counts = tf.reduce_sum(
            tf.cast(keys >= thresholds[:, tf.newaxis, tf.newaxis], tf.int32),
            axis=2,
        )
        # The parts are added without a reduction, because a second reduction
        # would be a kernel of its own.
        at_least = tf.add_n(tf.unstack(counts, axis=1))
        is_reached = at_least >= k
        # The largest reached threshold is kept, and the count of the next one,
        # because its keys are larger than the result.
        threshold = tf.reduce_max(tf.where(is_reached, thresholds, threshold))
        larger = tf.reduce_max(tf.where(is_reached, larger, at_least))
        above = shift
    return threshold, k - larger


def digit_histogram(
    keys: tf.Tensor,
    group: int | tf.Tensor,
    shift: int | tf.Tensor,
    prefix: tf.Tensor,
    digit_bits: int,
) -> tf.Tensor:
    """Counts the next digits of the keys that begin with `prefix`.

    Args:
        keys: Integer tensor; negative keys do not take part.
        group: int32 tensor that broadcasts to `keys`, the group of each key.
        shift: Scalar of the dtype of the keys, the position of the digit.
        prefix: Tensor `[groups]`, the bits above the digit that the counted
            keys of each group begin with.
        digit_bits: Number of bits in a digit.

    Returns:
        int32 tensor `[groups, 2 ** digit_bits]`.

    Example:

    >>> keys = tf.constant([0x21, 0x23, 0x23, 0x13])
    >>> digit_histogram(keys, 0, 0, tf.constant([0x2]), 4)[0, :4].numpy()
    array([0, 1, 0, 2], dtype=int32)
    """
    num_digits, num_groups = 1 << digit_bits, prefix.shape[0]
    rest = tf.bitwise.right_shift(keys, tf.cast(shift, keys.dtype))
    digit = tf.cast(rest & (num_digits - 1), tf.int32)
    rest = tf.bitwise.right_shift(rest, tf.constant(digit_bits, keys.dtype))
    takes_part = (rest == tf.gather(prefix, group)) & (keys >= 0)
    num_bins = num_groups * num_digits
    # A key that does not take part falls into no bin.
    bins = tf.where(takes_part, group * num_digits + digit, num_bins)
    return tf.reshape(
        bitmap.histogram(bins, num_bins), [num_groups, num_digits]
    )
