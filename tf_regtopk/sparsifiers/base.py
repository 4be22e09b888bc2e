"""The base class of sparsifiers."""

import abc
import dataclasses
from typing import ClassVar

from tf_regtopk import hyper_parameters


@dataclasses.dataclass(frozen=True)
class Sparsifier(hyper_parameters.HyperParameters, abc.ABC):
    """Base class: what the optimizer asks of a sparsifier.

    A subclass is a frozen dataclass of hyper-parameters that overrides `score`,
    and the two memory methods where it remembers something between steps. To be
    saved with a model it is registered with
    `keras.saving.register_keras_serializable`.

    Args:
        density: Float in (0, 1]. The share of entries that is sent.
    """

    # Whether entries that are NaN or infinite are always selected first. If
    # not, the optimizer has to look for them among all.
    selects_non_finite: ClassVar[bool] = False

    # Names of the numbers that `measure` returns.
    measured: ClassVar[tuple[str, ...]] = ()

    density: float = 0.001

    def __post_init__(self):
        self._check_number("density", "in (0, 1]", lambda d: 0 < d <= 1)

    def num_selected(self, num_entries):
        """k = max(1, round(density * J)) for J = `num_entries`."""
        return max(1, round(self.density * num_entries))

    def initial_memory(self, k, size, dtype):
        """Returns the memory before the first step.

        Args:
            k: Number of entries sent per step.
            size: J, the number of entries of the gradient.
            dtype: Float dtype of the gradient.

        Returns:
            Tuple of tensors, `()` if nothing is remembered.
        """
        del k, size, dtype
        return ()

    @abc.abstractmethod
    def score(self, a, memory, step):
        """The scores, of which the largest are selected.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            memory: Tuple of tensors from `initial_memory` or `remember`.
            step: Scalar int64 tensor, the number of steps taken so far.

        Returns:
            Float tensor `[J]`. Those of largest magnitude are selected.
        """

    def restore(self, a, scores, memory, selected):
        """Returns `a`, for a sparsifier that wrote its scores over it.

        If few scores differ from a, XLA stores them in the place of a, as long
        as nothing needs a afterwards; else it copies all of a first. A
        sparsifier can spare it that by overriding this method, to make a out of
        `scores` again.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            scores: Float tensor `[J]`, what `score` has returned for it.
            memory: As for `score`.
            selected: int32 tensor, what was selected by these scores.

        Returns:
            Float tensor `[J]`, equal to `a`.
        """
        del scores, memory, selected
        return a

    def measure(self, a, memory, indices):
        """Returns scalars about a step, for the optimizer's telemetry.

        Args:
            a: Float tensor `[J]`, the accumulated gradient.
            memory: As for `score`.
            indices: int32 tensor `[k]`, the selected entries.

        Returns:
            Tuple of scalar tensors, as many as there are names in `measured`.
        """
        del a, memory, indices
        return ()

    def remember(self, memory, indices, sent, aggregate, step):
        """Returns the memory for the next step.

        Args:
            memory: Tuple of tensors, the memory of this step.
            indices: int32 tensor `[k]`, the entries this replica sent.
            sent: Float tensor `[k]`, the values it sent.
            aggregate: Float tensor `[k]`, the sum of what all replicas sent for
                these entries.
            step: Scalar int64 tensor, the number of steps taken before.

        Returns:
            Tuple of tensors of the shapes and dtypes of `initial_memory`, the
            same object where a tensor stays as it is.
        """
        del indices, sent, aggregate, step
        return memory
