"""Layers that only some of the replicas train."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import variable_rules


@keras.saving.register_keras_serializable(package="tf_regtopk")
@dataclasses.dataclass(frozen=True)
class LayerMask(hyper_parameters.HyperParameters):
    r"""Layers that a replica leaves as they are, apart from exchanges.

    For `DecentralizedOptimizer`. A replica's local step changes only the layers
    that it trains, and the others have zeros as their gradient; in an exchange
    it takes the mean of all its layers with its neighbours. From weights W that
    all have in common, with the mean of all (`Complete()`), one step and one
    exchange give

        W_l = r (mean of those that trained layer l) + (1 - r) W_l

    where r is their share of the replicas. What the inner optimizer keeps of a
    layer, such as its momentum, fades on a replica that does not train it.

    A replica computes the gradients of all its layers nevertheless, because all
    replicas run the same program: the mask is for what is learnt, and saves no
    time.

    Args:
        frozen: For each replica the list of the layers that it does not train:
            parts of the paths of their variables, between slashes, such as
            `"dense_1"` or `"encoder/dense"`.

    Raises:
        ValueError: If `frozen` is no list of lists of strings.

    Example:

    >>> mask = LayerMask([["dense"], []])
    >>> mask.trains(["model/dense/kernel", "model/dense_1/kernel"], 2).tolist()
    [[False, True], [True, True]]

    Source: the partial freezing of Pfeiffer, Rapp, Khalili, Henkel, "CoCoFL:
    Communication- and Computation-Aware Federated Learning via Partial NN
    Freezing and Quantization" (2023), by weights in place of gradients.
    """

    frozen: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", _names(self.frozen))

    def trains(self, paths: Sequence[str], num_replicas: int) -> np.ndarray:
        """Returns who trains what, a bool array `[N, number of variables]`.

        Args:
            paths: The paths of the trainable variables.
            num_replicas: N.

        Raises:
            ValueError: If there is not one list for each replica, a name is in
                no path, or a variable is trained by nobody.
        """
        if len(self.frozen) != num_replicas:
            raise ValueError(
                "`layer_mask` must have a list for each of the "
                f"{num_replicas} replicas. Received: {len(self.frozen)} lists"
            )
        names = sorted(
            {name for of_replica in self.frozen for name in of_replica}
        )
        unknown = [n for n in names if not any(_is_in(n, p) for p in paths)]
        if unknown:
            raise ValueError(
                "`layer_mask` must have names of layers, which are between "
                f"slashes of the paths {[*paths]}. Received: {unknown}"
            )
        trains = np.array(
            [
                [not any(_is_in(n, path) for n in of_replica) for path in paths]
                for of_replica in self.frozen
            ]
        )
        idle = [paths[i] for i in np.flatnonzero(~trains.any(axis=0)).tolist()]
        if idle:
            raise ValueError(
                "`layer_mask` must let some replica train each variable (set "
                "`trainable=False` for a layer that nobody is to train). "
                f"Received: nobody trains {idle}"
            )
        return trains


class Masking:
    """A mask on the variables of an optimizer, for a replica context.

    Args:
        mask: `LayerMask`.
        variables: List of the trainable variables.
        num_replicas: N.
    """

    def __init__(
        self,
        mask: LayerMask,
        variables: Sequence[keras.Variable],
        num_replicas: int,
    ) -> None:
        paths = [variable_rules.path_of(v) for v in variables]
        self._trains = mask.trains(paths, num_replicas)
        self._variables = variables
        # Those that all replicas train are left alone.
        self._masked = np.flatnonzero(~self._trains.all(axis=0)).tolist()

    def gradients(
        self, gradients: Sequence[flat_buffer.Gradient]
    ) -> list[flat_buffer.Gradient]:
        """Returns gradients with zeros for what this replica does not train.

        Args:
            gradients: A gradient or None for each variable.
        """
        flags = self._flags()
        masked = [*gradients]
        for i in self._masked:
            gradient = masked[i]
            if isinstance(gradient, tf.IndexedSlices):
                masked[i] = tf.IndexedSlices(
                    tf.where(flags[i], gradient.values, 0),
                    gradient.indices,
                    gradient.dense_shape,
                )
            elif gradient is not None:
                masked[i] = tf.where(flags[i], gradient, 0)
        return masked

    def weights(self) -> list[tf.Tensor]:
        """Returns the weights of this replica that `restore` needs."""
        return [part.read_value() for part in self._parts()]

    def restore(self, weights: Sequence[tf.Tensor]) -> None:
        """Gives the layers that this replica does not train their weights back.

        Args:
            weights: List of tensors, from `weights` before the local step.
        """
        flags = self._flags()
        for i, part, before in zip(
            self._masked, self._parts(), weights, strict=True
        ):
            part.assign(tf.where(flags[i], part.read_value(), before))

    def _parts(self) -> list[tf.Variable]:
        strategy = tf.distribute.get_strategy()
        return [
            replica_state.local_part(self._variables[i], strategy)
            for i in self._masked
        ]

    def _flags(self) -> tf.Tensor:
        """A bool tensor: for each variable whether this replica trains it."""
        rank = strategy_lib.replica_rank()
        with tf.device("CPU:0"):
            return tf.gather(tf.constant(self._trains), rank)


def _is_in(name: str, path: str) -> bool:
    return f"/{name}/" in f"/{path}/"


def _names(frozen: Any) -> tuple[tuple[str, ...], ...]:
    """Lists of strings as tuples."""
    if not _is_list(frozen) or not all(
        _is_list(part) and all(isinstance(n, str) and n for n in part)
        for part in frozen
    ):
        raise ValueError(
            "`frozen` must be a list of lists of names of layers such as "
            f'`[["dense"], []]`. Received: frozen={frozen!r}'
        )
    return tuple(tuple(part) for part in frozen)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
