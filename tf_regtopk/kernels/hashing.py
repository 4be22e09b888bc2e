"""Numbers that look random, the same wherever they are computed.

XLA's own generators are not used, because they take hundreds of nanoseconds per
number on a CPU.
"""

import tensorflow as tf

from tf_regtopk.kernels import ranges


def hash_bits(
    size: int, seed: int, step: int | tf.Tensor, replica: int | tf.Tensor = 0
) -> tf.Tensor:
    r"""Computes a 32-bit hash of each position, fresh for each seed and step.

        hash_j = mix(mix(j + mix(step xor mix(replica))) + mix(seed))

    Args:
        size: Number of positions.
        seed: Any integer.
        step: Scalar integer.
        replica: Scalar integer, the rank of a replica where replicas are to
            draw different numbers.

    Returns:
        uint32 tensor `[size]`.

    Example:

    >>> hash_bits(3, seed=0, step=tf.constant(0)).numpy().tolist()
    [0, 804215951, 3050591713]
    """
    # Any integer serves as a seed, because the arithmetic wraps around.
    seed = tf.constant(seed % 2**32, tf.uint32)
    stream = tf.cast(step, tf.uint32) ^ mix_bits(tf.cast(replica, tf.uint32))
    start = tf.bitcast(mix_bits(stream), tf.int32)
    mixed = mix_bits(tf.bitcast(ranges.range_from(start, size), tf.uint32))
    return mix_bits(mixed + mix_bits(seed))


def uniform(
    size: int,
    seed: int,
    step: int | tf.Tensor,
    replica: int | tf.Tensor = 0,
    dtype: tf.DType = tf.float32,
) -> tf.Tensor:
    r"""Draws numbers uniform in [0, 1), from the high bits of `hash_bits`.

        u_j = floor(hash_j / 2^8) / 2^24

    Args:
        size: Number of positions.
        seed: Any integer.
        step: Scalar integer.
        replica: Scalar integer, the rank of a replica where replicas are to
            draw different numbers.
        dtype: Float dtype of the result.

    Returns:
        Tensor `[size]` of `dtype`.
    """
    hashes = hash_bits(size, seed, step, replica)
    high_bits = tf.bitwise.right_shift(hashes, tf.constant(8, tf.uint32))
    return tf.cast(tf.bitcast(high_bits, tf.int32), dtype) * 2.0**-24


def mix_bits(x: tf.Tensor) -> tf.Tensor:
    """Applies MurmurHash3's finaliser (Appleby), a permutation of words.

    Args:
        x: uint32 tensor.

    Returns:
        uint32 tensor of the same shape.
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x ^= tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32))
        x *= tf.constant(factor, tf.uint32)
    return x
