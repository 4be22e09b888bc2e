"""The sum of the entries that all replicas sent."""

import tensorflow as tf

from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import words

# A run of one replica's entries spans about this many entries of the gradient,
# because the runs of the other replicas then find that part in the cache.
_SPAN = 1 << 18
# A run has at least so many entries, because starting a shorter one takes
# longer than adding its entries.
_SHORTEST_RUN = 1 << 14


def sum_entries(indices: tf.Tensor, values: tf.Tensor, size: int) -> tf.Tensor:
    r"""Adds the entries of all replicas into one dense gradient.

        agg_j = sum over replicas n of sent_{n,j}

    Entries are added run by run, and within a run replica after replica. An
    index occurs once in the run of a replica, so no two additions to one entry
    ever race, and the sum is the same to the bit on every replica, whatever
    order a scatter works in.

    It is the same on CPUs and GPUs too if the entries of a replica are one run.
    Many entries are several runs on CPUs, and always one on GPUs: there a sum
    of three or more replicas may be rounded in another way.

    Args:
        indices: Tensor `[N, k]` of int32 or of held words, every index at most
            once in each row; not read if k = J.
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
    num_replicas, k = values.shape
    if k == size:  # Every replica has sent all entries, in their order.
        return tf.reduce_sum(values, axis=0)

    def add_runs(
        aggregate: tf.Tensor, first: int, length: int, num_runs: int
    ) -> tf.Tensor:
        def add_run(
            i: tf.Tensor, aggregate: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            corner = [i % num_replicas, first + i // num_replicas * length]
            run = [1, length]
            return i + 1, tf.tensor_scatter_nd_add(
                aggregate,
                # Words are released run by run, because releasing all of them
                # at once would copy them.
                words.release(tf.slice(indices, corner, run)[0], tf.int32)[
                    :, tf.newaxis
                ],
                tf.slice(values, corner, run)[0],
            )

        return tf.while_loop(
            lambda i, _: i < num_runs * num_replicas, add_run, (0, aggregate)
        )[1]

    length = min(k, max(_SHORTEST_RUN, _SPAN * k // size))
    if device_kind.is_gpu():
        length = k  # Starting a run costs more than the cache saves.
    num_runs, rest = divmod(k, length)
    aggregate = tf.zeros([size], values.dtype)
    aggregate = add_runs(aggregate, 0, length, num_runs)
    if rest:
        aggregate = add_runs(aggregate, k - rest, rest, 1)
    return aggregate
