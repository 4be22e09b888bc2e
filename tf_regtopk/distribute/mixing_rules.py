r"""Rules of mixing: how far a replica goes towards its neighbours.

A replica i that has received `sent_j` of its neighbours adds d_i to its own:

    LinearGossip      d_i = sum over j of (W - I)_ij sent_j
    NonlinearGossip   d_i = epsilon sum over j of W_ij f(sent_j - sent_i)
                      f(delta) = sign(delta) |delta|^alpha
    AverageTracker    d_i as by LinearGossip, and a second vector, which follows
                      the mean of all weights
"""

import abc
import dataclasses
from typing import ClassVar
from typing import NamedTuple

import keras
import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk.kernels import scatter_sum


class Received(NamedTuple):
    """Everything that a replica has received of M replicas, itself among them.

    Args:
        indices: Tensor `[M, k]` of int32 or of held words, the entries that
            were sent; not read if k = J.
        values: Float tensor `[M, k]`.
        weights: Float tensor `[M]`, the entries of row i of W - I.
    """

    indices: tf.Tensor
    values: tf.Tensor
    weights: tf.Tensor


@dataclasses.dataclass(frozen=True)
class MixingRule(hyper_parameters.HyperParameters, abc.ABC):
    """Base class: what a replica makes of what its neighbours have sent.

    For `DecentralizedOptimizer`. A subclass is a frozen dataclass, registered
    with `keras.saving.register_keras_serializable`.
    """

    # Whether it needs all entries of the weights themselves, and W = W^T.
    compares_weights: ClassVar[bool] = False
    # Whether replicas exchange a second vector, which tracks their mean.
    tracks_average: ClassVar[bool] = False

    @abc.abstractmethod
    def disagreement(
        self, received: Received, own: tf.Tensor, size: int
    ) -> tf.Tensor:
        """Returns d, which is added to the weights of this replica.

        XLA compiles this method.

        Args:
            received: `Received`.
            own: Float tensor `[k]`, the values that this replica has sent.
            size: J.

        Returns:
            Float tensor `[J]`.
        """


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class LinearGossip(MixingRule):
    r"""The average by the mixing matrix W.

        d_i = sum over j of (W - I)_ij sent_j

    Example:

    >>> indices = tf.constant([[0, 2], [0, 1]])
    >>> values = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    >>> received = Received(indices, values, tf.constant([-0.5, 0.5]))
    >>> LinearGossip().disagreement(received, values[0], 3).numpy()
    array([ 1.,  2., -1.], dtype=float32)
    """

    def disagreement(
        self, received: Received, own: tf.Tensor, size: int
    ) -> tf.Tensor:
        weights = tf.cast(received.weights, received.values.dtype)
        return scatter_sum.sum_entries(
            received.indices, received.values * weights[:, tf.newaxis], size
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class NonlinearGossip(MixingRule):
    r"""Gossip in which large differences count less, and small ones more.

        d_i = epsilon sum over j of W_ij f(x_j - x_i)
        f(delta) = sign(delta) |delta|^alpha           entry by entry

    With alpha < 1 replicas that are near to each other come together faster
    than by any linear rule, until they are so near that f takes them past each
    other: the distance then stays at about `epsilon^(1 / (1 - alpha))`. The
    mean of all stays as it is, because f is odd and W symmetric.

    Needs all entries of the weights as they are: `Dense()`, a codec that rounds
    nothing, `NoFeedback()`, and a topology whose mixing matrices are symmetric.

    Args:
        alpha: Float in (0, 1]. 1 is linear gossip, slower by epsilon.
        epsilon: Float in (0, 1], the step size. (`consensus_step_size` of the
            optimizer multiplies it.)

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument breaks its rule.

    Example:

    >>> values = tf.constant([[1.0], [5.0]])
    >>> received = Received(
    ...     tf.zeros([2, 1]), values, tf.constant([-0.5, 0.5]))
    >>> rule = NonlinearGossip(alpha=0.5, epsilon=0.1)
    >>> rule.disagreement(received, values[0], 1).numpy()
    array([0.1], dtype=float32)

    Source: "Finite-Time Consensus Learning for Decentralized Optimization with
    Nonlinear Gossiping" (2021).
    """

    alpha: float = 0.75
    epsilon: float = 0.1

    compares_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("alpha", "epsilon"):
            self._check_number(name, "in (0, 1]", lambda value: 0 < value <= 1)

    def disagreement(
        self, received: Received, own: tf.Tensor, size: int
    ) -> tf.Tensor:
        differences = received.values - own
        # The replica's own row, of another weight, is 0.
        powers = tf.sign(differences) * tf.abs(differences) ** self.alpha
        weights = tf.cast(received.weights, powers.dtype)
        return self.epsilon * tf.reduce_sum(
            powers * weights[:, tf.newaxis], axis=0
        )


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class AverageTracker(LinearGossip):
    r"""Linear gossip, with a second vector z_i that tracks the mean of all x_i.

        z_i(0)     = x_i(0)
        z_i(t + 1) = sum over j of W_ij z_j(t) + x_i(t + 1) - x_i(t)

    from one exchange to the next. The sum of all z_i is that of all x_i, and
    while the weights change by about the same in each step, z_i stays within a
    constant distance of their mean. `tracked(model)` gives each replica its z_i
    for a while, without waiting for all replicas as `averaged(model)` does.

    z_i is sent whole, in 32 bits an entry (64 where a weight has 64), which
    **doubles the bytes** of `Dense()` and outweighs those of any compression;
    `wire_report` counts them.

    Example:

    ```python
    optimizer = tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1), mixing_rule=tf_regtopk.AverageTracker())
    ...
    with tf_regtopk.tracked(model):
        model.evaluate(dataset)
    ```

    Source: FODAC, first-order dynamic average consensus, of "DACFL: Dynamic
    Average Consensus Based Federated Learning in Decentralized Topology"
    (2021).
    """

    tracks_average: ClassVar[bool] = True
