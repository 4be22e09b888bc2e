"""The base class of rules of error feedback."""

import abc
import dataclasses
from typing import NamedTuple
from typing import TypeAlias

import tensorflow as tf

from tf_regtopk import hyper_parameters
from tf_regtopk import validation
from tf_regtopk.error_feedback import equations

# Tensors of a rule's state: local or shared ones.
Tensors: TypeAlias = tuple[tf.Tensor, ...]


class Progress(NamedTuple):
    """Progress of the training: the learning rate, and the steps taken before.

    Args:
        learning_rate: Scalar float tensor, the inner optimizer's.
        number: Scalar integer tensor, the number of steps taken before.
    """

    learning_rate: tf.Tensor
    number: tf.Tensor


class StepContext(NamedTuple):
    """The context of a step: its facts for the rules.

    Args:
        num_replicas: N.
        density: k / J.
        learning_rate: Scalar float tensor, the inner optimizer's; only for
            rules with `needs_learning_rate`.
        number: Scalar integer tensor, the number of steps taken before.
        accepted: Scalar float tensor, the share of a replica's J entries that
            are in the total, on average over the replicas; None before the
            exchange, and where all k entries are.
    """

    num_replicas: int
    density: float
    learning_rate: tf.Tensor
    number: tf.Tensor
    accepted: tf.Tensor | None = None

    @property
    def applied_density(self) -> float | tf.Tensor:
        """Share of a replica's J entries that are in the total: `accepted`."""
        return self.density if self.accepted is None else self.accepted


@dataclasses.dataclass(frozen=True)
class ErrorFeedback(hyper_parameters.HyperParameters, abc.ABC):
    """Base class: a rule of error feedback.

    A subclass is a frozen dataclass of hyper-parameters. To be saved with a
    model it is registered with `keras.saving.register_keras_serializable`.

    Its state are `num_local` tensors `[J]` that start as zeros, of which each
    replica has its own, and the tensors of `initial_shared`, which are the same
    on all. If the number of replicas changes, the sums over the replicas of the
    local ones are kept and spread evenly.
    """

    @property
    def residual_place(self) -> int | None:
        """Place of the residual error in the local tensors; None without."""
        return None

    @property
    def has_momentum(self) -> bool:
        """True if the rule applies momentum, and the inner optimizer shall not.

        The optimizer warns of a momentum that is applied twice.
        """
        return False

    @property
    def needs_learning_rate(self) -> bool:
        """True if the rule reads `StepContext.learning_rate`."""
        return False

    @property
    @abc.abstractmethod
    def num_local(self) -> int:
        """Number of tensors that each replica has for itself."""

    def initial_local(self, size: int, dtype: tf.DType) -> Tensors:
        """Returns the local tensors before the first step: zeros."""
        return (tf.zeros([size], dtype),) * self.num_local

    def initial_shared(self, size: int, dtype: tf.DType) -> Tensors:
        """The shared tensors before the first step.

        Args:
            size: J.
            dtype: Float dtype of the gradient.

        Returns:
            Tuple of tensors.
        """
        del size, dtype
        return ()

    @abc.abstractmethod
    def accumulate(
        self,
        local: Tensors,
        shared: Tensors,
        gradient: tf.Tensor,
        context: StepContext,
    ) -> tuple[tf.Tensor, Tensors]:
        """Returns the vector from which entries are selected.

        Args:
            local: Tuple of `num_local` tensors `[J]`.
            shared: Tuple of tensors, as of `initial_shared`.
            gradient: Tensor `[J]`, this replica's g.
            context: `StepContext`.

        Returns:
            `(a, local)`: a, and the tuple of the local tensors: a itself where
            a rule keeps a until it is known what was sent, and the same object
            where one stays as it is.
        """

    @abc.abstractmethod
    def update(
        self,
        local: Tensors,
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: StepContext,
    ) -> Tensors:
        """The local tensors for the next step.

        Args:
            local: As returned by `accumulate`.
            indices: int32 tensor `[k]`, the entries sent, each once.
            sent: Tensor `[k]`, the values that the receivers see.
            total: Tensor `[J]`, the sum of what all replicas sent.
            context: `StepContext`.

        Returns:
            Tuple of tensors `[J]`, the same object where one stays as it is.
        """

    def add_error(
        self,
        local: Tensors,
        indices: tf.Tensor,
        error: tf.Tensor,
        total: tf.Tensor,
        context: StepContext,
    ) -> Tensors:
        """The local tensors of a replica that takes an error over.

        What a codec rounds off a sum of several replicas is kept by one of
        them, as if that had sent so much less. Called after `update`, only in
        topologies that sum entries on the way. By default the error is added
        to the residual error; a rule that keeps none says what to do.

        Args:
            local: As returned by `update`.
            indices: int32 tensor `[n]`, each once.
            error: Tensor `[n]`, the sums less what is in the total.
            total: As of `update`.
            context: `StepContext`.

        Returns:
            Tuple of tensors `[J]`.

        Raises:
            ValueError: If the rule does not say.
        """
        del total, context
        place = self.residual_place
        if place is None:
            raise ValueError(
                "`error_feedback` must define `add_error` in a topology that "
                f"sums entries on the way. Received: error_feedback={self}"
            )
        added = equations.add_sent(local[place], indices, error)
        return (*local[:place], added, *local[place + 1 :])

    def aggregate(
        self, shared: Tensors, total: tf.Tensor, context: StepContext
    ) -> tuple[tf.Tensor, Tensors]:
        """Returns the gradient for the inner optimizer.

        Args:
            shared: Tuple of tensors, as of `initial_shared`.
            total: Tensor `[J]`, the sum of what all replicas sent.
            context: `StepContext`.

        Returns:
            `(aggregate, shared)`.
        """
        del context
        return total, shared

    def when_dense(self) -> "ErrorFeedback":
        """Returns the rule of variables that are exchanged densely.

        Those are all variables with `exchange="dense"` or `"auto"`, which need
        this method, and those of `dense` and `dense_below`, which are just
        summed if the rule does not say.

        Returns:
            `ErrorFeedback` without local tensors.

        Raises:
            ValueError: If the rule does not say.
        """
        raise ValueError(
            '`exchange` must be "sparse" with a rule of error feedback that '
            f"has no `when_dense`. Received: error_feedback={self}"
        )


def check_factor_masking(factor_masking: bool, momentum: float) -> None:
    """Raises unless `factor_masking` is a bool, and has a momentum to mask."""
    validation.check_boolean("factor_masking", factor_masking)
    if factor_masking and not momentum:
        raise ValueError(
            "`factor_masking` must go with `momentum`, which it masks. "
            "Received: factor_masking=True, momentum=0"
        )
