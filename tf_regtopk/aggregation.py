"""The sum of what all replicas sent."""

import tensorflow as tf


def sum_entries(indices, values, size):
    r"""Adds the entries of all replicas into one dense gradient.

        agg_j = sum over replicas n, in order, of sent_{n,j}

    Replicas are added one after another: an index occurs once in each, so no
    two additions to one entry ever race, and the sum is the same to the bit on
    every replica and device, whatever order a scatter works in.

    Args:
        indices: int32 tensor `[N, k]`, in each row every index at most once.
        values: Float tensor `[N, k]`.
        size: J, the number of entries of the gradient.

    Returns:
        Float tensor `[J]`.

    Example:

    >>> indices = tf.constant([[0, 2], [2, 1]])
    >>> values = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    >>> sum_entries(indices, values, 4).numpy()
    array([1., 4., 5., 0.], dtype=float32)
    """

    def add_replica(n, aggregate):
        return n + 1, tf.tensor_scatter_nd_add(
            aggregate, indices[n][:, tf.newaxis], values[n]
        )

    num_replicas = indices.shape[0]
    _, aggregate = tf.while_loop(
        lambda n, _: n < num_replicas,
        add_replica,
        (0, tf.zeros([size], values.dtype)),
    )
    return aggregate
