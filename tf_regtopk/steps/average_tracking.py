r"""A vector of each replica that tracks the mean of all replicas' weights.

    z_i(t + 1) = sum over j of W_ij z_j(t) + x_i(t + 1) - x_i(t)

What a replica keeps from one exchange to the next is what z_i is ahead of its
weights, so that z_i is known at any time:

    c_i(t) = sum over j of W_ij z_j(t) - x_i(t),    z_i = c_i + x_i

All c_i add up to 0, whatever becomes of the weights.
"""

import tensorflow as tf

from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import neighbours
from tf_regtopk.distribute import vector_exchange


class AverageTracking:
    """The exchange of z, see the module.

    To be created as `Neighbours` is.

    Args:
        topology: `MixingTopology`.
        num_replicas: N.
    """

    def __init__(
        self, topology: mixing.MixingTopology, num_replicas: int
    ) -> None:
        self._exchange = vector_exchange.VectorExchange(
            neighbours.rounds_of(topology, num_replicas),
            neighbours.differences(topology, num_replicas),
        )

    def next(
        self, ahead: tf.Tensor, x: tf.Tensor, number: tf.Tensor
    ) -> tf.Tensor:
        """Returns c after an exchange.

        To be called in a replica context.

        Args:
            ahead: Float tensor `[J]`, c before it.
            x: Float tensor `[J]`, the weights at this time.
            number: Scalar integer tensor, the number of exchanges before.

        Returns:
            Float tensor `[J]`.
        """
        z = ahead + x
        return ahead + self._exchange.sum(z, number)
