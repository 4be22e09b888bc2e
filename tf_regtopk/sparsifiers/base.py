"""The base class of sparsifiers."""

import abc
from collections.abc import Sequence
import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk.sizes import selected


@dataclasses.dataclass(frozen=True)
class Sparsifier(hyper_parameters.HyperParameters, abc.ABC):
    """Base class of sparsifiers.

    A subclass is a frozen dataclass of hyper-parameters that overrides `score`,
    and the two memory methods if it remembers something between steps. A
    subclass that is saved with a model must be registered with
    `keras.saving.register_keras_serializable`.

    Args:
        density: Float in (0, 1], or None. The share of entries that is sent.
            None is 0.1 %, but at least 1,000 entries.
    """

    # True if entries that are NaN or infinite are always selected first. If
    # False, the optimizer looks for such entries in the whole gradient.
    selects_non_finite: ClassVar[bool] = False

    # Names of the numbers that `measure` returns.
    measured: ClassVar[tuple[str, ...]] = ()

    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None:
            self._check_number("density", "in (0, 1]", lambda d: 0 < d <= 1)

    def num_selected(self, num_entries: int) -> int:
        """Returns k for J = `num_entries`.

            k = max(1, round(density * J))
            k = min(J, max(1000, round(0.001 * J)))    if density is None

        Args:
            num_entries: J.
        """
        return selected.num_selected(self.density, num_entries)

    def density_of(self, num_entries: int) -> float:
        """Returns the share of J = `num_entries` entries that is sent."""
        if self.density is not None:
            return self.density
        return (
            self.num_selected(num_entries) / num_entries if num_entries else 1.0
        )

    def initial_memory(
        self, k: int, size: int, dtype: tf.DType
    ) -> tuple[tf.Tensor, ...]:
        """Makes the memory of a replica before its first step.

        Args:
            k: Number of entries sent per step.
            size: J, the number of entries of the gradient.
            dtype: Float dtype of the gradient.

        Returns:
            Tuple of tensors, `()` if the sparsifier remembers nothing.
        """
        del k, size, dtype
        return ()

    def is_valid_memory(self, memory: Sequence[np.ndarray], size: int) -> bool:
        """Returns whether a loaded memory makes sense, before it is used.

        Args:
            memory: NumPy arrays of the shapes and dtypes of `initial_memory`.
            size: J, the number of entries of the gradient.
        """
        del memory, size
        return True

    @abc.abstractmethod
    def score(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, ...], step: tf.Tensor
    ) -> tf.Tensor:
        """Scores the entries; the scores of largest magnitude are selected.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            memory: Tuple of tensors from `initial_memory` or `remember`.
            step: Scalar int64 tensor, the number of steps taken so far.

        Returns:
            Float tensor `[J]`.
        """

    def restore(
        self,
        a: tf.Tensor,
        scores: tf.Tensor,
        memory: tuple[tf.Tensor, ...],
        selected: tf.Tensor,
    ) -> tf.Tensor:
        """Returns `a`, for a sparsifier that wrote its scores over it.

        If few scores differ from a, XLA stores the scores in the place of a, as
        long as nothing needs a afterwards; otherwise XLA copies all of a first.
        A sparsifier avoids that copy if it overrides this method and makes a
        out of `scores` again.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            scores: Float tensor `[J]` that `score` has returned for a.
            memory: Tuple of tensors that `score` was given.
            selected: int32 tensor, the entries selected by these scores.

        Returns:
            Float tensor `[J]`, equal to `a`.
        """
        del scores, memory, selected
        return a

    def measure(
        self, a: tf.Tensor, memory: tuple[tf.Tensor, ...], indices: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Returns scalars about a step, for the optimizer's telemetry.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            memory: Tuple of tensors that `score` was given.
            indices: int32 tensor `[k]`, the selected entries.

        Returns:
            Tuple of scalar tensors, as many as there are names in `measured`.
        """
        del a, memory, indices
        return ()

    def remember(
        self,
        memory: tuple[tf.Tensor, ...],
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        """Returns the memory for the next step.

        Args:
            memory: Tuple of tensors, the memory of this step.
            indices: int32 tensor `[k]`, the entries this replica sent.
            sent: Float tensor `[k]`, the values it sent; 0 also where a value
                is not in the sum, because a codec rounded it to 0 or an owner
                kept others (`ReduceScatter`).
            total: Float tensor `[k]`, the sum over all replicas of the
                values sent for these entries.
            step: Scalar int64 tensor, the number of steps taken before.

        Returns:
            Tuple of tensors of the shapes and dtypes of `initial_memory`, the
            same object if a tensor is unchanged.
        """
        del indices, sent, total, step
        return memory
