"""The k-th largest of many integers, by radix search from the top digit."""

import tensorflow as tf

from tf_regtopk import bitmap


def kth_largest(histogram_of, ks, dtype, digit_bits):
    """The k-th largest key of each group.

    Args:
        histogram_of: Function of a position `shift` and of the higher bits
            `prefix` of each group's result. Returns the `digit_histogram` of
            all keys.
        ks: The k of each group, integers or scalar int32 tensors.
        dtype: int32 or int64, the type of the keys.
        digit_bits: How many bits to find at a time.

    Returns:
        `(threshold, num_ties)`, both of shape `[groups]`: the k-th largest key,
        and how many of the keys equal to it belong to the k largest.
    """

    def next_digit(shift, prefix, remaining):
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


def digit_histogram(keys, group, shift, prefix, digit_bits):
    """How many of the keys that begin with `prefix` have which next digit.

    Args:
        keys: Integer tensor; negative ones do not take part.
        group: int32 tensor that broadcasts to `keys`, the group of each.
        shift: Scalar of the type of the keys, the position of the digit.
        prefix: Tensor `[groups]`, the bits above it that count in each group.
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
    # What does not take part falls into no bin.
    bins = tf.where(takes_part, group * num_digits + digit, num_bins)
    return tf.reshape(
        bitmap.histogram(bins, num_bins), [num_groups, num_digits]
    )
