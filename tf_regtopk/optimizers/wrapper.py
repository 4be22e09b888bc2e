"""A Keras optimizer around another one: all but aggregating and saving."""

import abc
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import ClassVar
import warnings
import weakref

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk import training_validation
from tf_regtopk.distribute import branches
from tf_regtopk.kernels import tracing
from tf_regtopk.optimizers import wrapper_saving
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import own_gradients
from tf_regtopk.steps import verdict


class OptimizerWrapper(wrapper_saving.WrapperSaving):
    """Aggregates gradients in its own way, and lets an inner optimizer apply.

    To Keras this is an optimizer with the inner one's learning rate, step count
    and variables. A subclass says in `_create_state` what it keeps, and in
    `_step` how the gradients of the replicas become one; `WrapperSaving` has
    the part that saves and loads.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to wrap.
        name: String. The name of the optimizer.
    """

    # False for a wrapper whose replicas exchange weights.
    exchanges_gradients: ClassVar[bool] = True

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        name: str | None = None,
    ) -> None:
        training_validation.check_keras()
        keras_internals.check_upstream()
        training_validation.check_inner_optimizer(
            inner_optimizer, OptimizerWrapper
        )
        training_validation.check_strategy()
        training_validation.check_in_scope_of(
            "inner_optimizer", keras_internals.strategy_of(inner_optimizer)
        )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.is_scaled_locally = False
        # True for a scale of the loss, because skipped steps find the scale.
        self.expects_skips = False
        # Whether the inner optimizer's clipping acts before the aggregation.
        self.clips_replicas = False
        self._has_warned_of_loss = False

    @abc.abstractmethod
    def _create_state(self, variables: Sequence[keras.Variable]) -> None:
        """Creates what the aggregation keeps between steps, in the scope."""

    @abc.abstractmethod
    def _step(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        apply: Callable[[Sequence[flat_buffer.Gradient]], None],
        skip: Callable[[], None],
    ) -> tf.Tensor:
        """Takes a step on all replicas or on none, see `steps.step.take_step`.

        Args:
            gradients: One gradient of this replica for each variable that the
                optimizer was built with, in that order, or None.
            apply: Function of as many gradients, the same on every replica.
            skip: Function to be called instead if a number is not finite.

        Returns:
            Scalar bool tensor, False if the step was skipped.
        """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the variables of this and of the inner optimizer.

        Args:
            variables: List of the trainable variables.
        """
        if self.built:
            return
        if tf.distribute.has_strategy():
            training_validation.check_in_scope_of(
                "optimizer", keras_internals.strategy_of(self)
            )
        build_once_for_all_replicas(self, lambda: self._build(variables))

    def _check_inner_optimizer(self) -> None:
        """Raises if the inner optimizer was given what it must not have."""
        if not self._lets_inner_accumulate:
            training_validation.check_no_accumulation(self.inner_optimizer)

    def _build(self, variables: Sequence[keras.Variable]) -> None:
        self._check_inner_optimizer()
        keras_internals.keep_collectives_apart(
            keras_internals.strategy_of(self)
        )
        _take(self.inner_optimizer, self)
        # An earlier wrapper may have left its changes, because none has ended
        # them where that wrapper was forgotten.
        keras_internals.give_back(self.inner_optimizer)
        self.inner_optimizer.build(variables)
        wrapper_saving.leave_saving_to_wrapper(self.inner_optimizer)
        keras_internals.take_aggregated_gradients(self.inner_optimizer)
        if self.clips_replicas:
            self._clip = keras_internals.take_clipping(self.inner_optimizer)
        keras_internals.divide_by_no_zeros(self.inner_optimizer)
        super().build(variables)
        self._skipped_steps = self.add_variable(
            shape=(),
            dtype="int",
            aggregation="only_first_replica",
            name="skipped_steps",
        )
        self._create_state(variables)
        self._save_with_checkpoints()

    def release_inner_optimizer(self) -> None:
        """Makes a plain Keras optimizer of the inner one again."""
        keras_internals.give_back(self.inner_optimizer)
        _wrappers.pop(self.inner_optimizer, None)
        wrapper_saving.give_saving_back(self.inner_optimizer)

    def apply(
        self,
        grads: Iterable[flat_buffer.Gradient],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        """Aggregates the gradients and lets the inner optimizer apply them.

        If a gradient of any replica holds NaN or infinity, no replica applies
        anything, and `skipped_steps` counts it.

        Args:
            grads: List of this replica's gradients: tensors, `tf.IndexedSlices`
                or None.
            trainable_variables: List of the variables that the gradients belong
                to. Defaults to those the optimizer was built with.
        """
        self.apply_if_finite(grads, trainable_variables)

    # AutoGraph would translate all of the library in vain, and for seconds,
    # because none of its control flow depends on tensors.
    @tracing.untranslated
    def apply_if_finite(
        self,
        grads: Iterable[flat_buffer.Gradient],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> tf.Tensor:
        """Applies gradients, and returns whether the step was taken.

        Returns:
            Scalar bool tensor, False if the step was skipped, the same on every
            replica.
        """
        grads = list(grads)
        if not grads:
            return tf.constant(True)
        self.check_context()
        training_validation.check_loss_scaling(self.is_scaled_locally)
        variables = self._variables_of(grads, trainable_variables)
        self._check_inner_optimizer()
        slots = [self._slot_of(variable) for variable in variables]
        if len(set(slots)) < len(slots):
            raise ValueError(
                "`trainable_variables` must hold each variable once. Received: "
                f"{[variable.name for variable in variables]}"
            )
        training_validation.check_gradient_shapes(grads, variables)
        if all(grad is None for grad in grads):
            # Keras raises its own error here, because nothing can be applied.
            self.inner_optimizer.apply(grads, variables)
        gradients: list[flat_buffer.Gradient] = [None] * len(
            self._trainable_variables
        )
        for slot, grad in zip(slots, grads, strict=True):
            gradients[slot] = grad
        factor = self.inner_optimizer.loss_scale_factor

        def apply(aggregate: Sequence[flat_buffer.Gradient]) -> None:
            # It would divide again. (All replicas are past their `factor`.)
            self.inner_optimizer.loss_scale_factor = None
            try:
                keras_internals.apply_aggregated(
                    self.inner_optimizer,
                    [aggregate[slot] for slot in slots],
                    variables,
                )
            finally:
                self.inner_optimizer.loss_scale_factor = factor
            self._iterations.assign_add(1)

        def skip() -> None:
            if not self.expects_skips:
                verdict.tell_of_first_skip(self._skipped_steps.value)
            self._skipped_steps.assign_add(1)
            # Looking at all weights costs little, because few steps are
            # skipped.
            finiteness.call_if_not_finite(self._kept(), self._warn_of_loss)

        return self._step(self._unscaled(gradients), apply, skip)

    def check_context(self) -> None:
        """Raises where no step can be taken."""
        training_validation.check_replica_context()
        training_validation.check_in_scope_of(
            "optimizer", keras_internals.strategy_of(self)
        )
        training_validation.check_not_compiled_as_a_whole(
            keras_internals.in_xla_context()
        )

    def tells_of_overflow(self) -> tf.Tensor:
        """Returns whether the next `apply` ends a step that is judged.

        For a scale of the loss, in a replica context before `apply`.

        Returns:
            Scalar bool tensor. False for a batch that is only added up, and
            where a function that was traced before `set_density` skips.
        """
        return tf.constant(True)

    def _unscaled(
        self, gradients: Sequence[flat_buffer.Gradient]
    ) -> Sequence[flat_buffer.Gradient]:
        """The gradients of the loss without its `loss_scale_factor`.

        The factor is taken out first, because clipping and what replicas keep
        are in the units of the loss, and the factor may change.
        """
        factor = self.inner_optimizer.loss_scale_factor
        if factor is None:
            return gradients
        return own_gradients.unscaled(
            gradients, self._trainable_variables, factor
        )

    def _kept(self) -> list[tuple[str, tf.Variable | keras.Variable]]:
        """Numbers that no later step makes finite, each with what to say."""
        if not branches.may_be_first_replica():
            return []  # The weights of all replicas are the same.
        inner = type(self.inner_optimizer).__name__
        return [
            (
                f"The weights of {getattr(variable, 'path', variable.name)} "
                "hold NaN or infinity, though all gradients that were applied "
                f"were finite: the update of {inner} made them so. Go back to "
                "a backup and lower the learning rate; or see whether "
                f"{inner} divides by zero where a gradient is 0, as most "
                "entries of a sparsified one are (then it needs a positive "
                "`epsilon`).",
                variable,
            )
            for variable in self._trainable_variables
            # Such a variable gets another value in every step.
            if not getattr(variable, "overwrite_with_gradient", False)
        ]

    def _warn_of_loss(self, message: str) -> None:
        """Warns once of numbers of `_kept` that are NaN or infinite."""
        if not self._has_warned_of_loss:
            self._has_warned_of_loss = True
            warnings.warn(message, stacklevel=2)

    def _variables_of(
        self,
        grads: Sequence[flat_buffer.Gradient],
        trainable_variables: Iterable[keras.Variable] | None,
    ) -> list[keras.Variable]:
        """The variables of `grads`; builds the optimizer on the first call."""
        if trainable_variables is not None:
            variables = list(trainable_variables)
            self.build(variables)
        elif self.built:
            variables = self._trainable_variables
        else:
            raise training_validation.variables_needed()
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must hold one gradient for each variable. Received: "
                f"{len(grads)} gradients for {len(variables)} variables"
            )
        return variables

    def _slot_of(self, variable: keras.Variable) -> int:
        """The place of a variable in the list the optimizer was built with."""
        try:
            return self._get_variable_index(variable)
        except KeyError:
            raise ValueError(
                "`trainable_variables` must be those the optimizer was built "
                f"with. Received the unknown variable: {variable}. For a new "
                "set of variables make a new optimizer"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        # The base class sets its own before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            training_validation.check_no_base_setting(name, value)
        super().__setattr__(name, value)

    @property
    def variables(self) -> list[keras.Variable]:
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> keras.Variable | tf.Tensor:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(
        self,
        learning_rate: (
            float | tf.Tensor | keras.optimizers.schedules.LearningRateSchedule
        ),
    ) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> keras.Variable:
        return self.inner_optimizer.iterations

    @property
    def skipped_steps(self) -> keras.Variable:
        """Number of steps not taken, because some gradient was not finite."""
        return self._skipped_steps

    @property
    def loss_scale_factor(self) -> float:
        # None is not returned, because Keras sets no attribute to the value
        # that it has already, and the setter must run.
        factor = self.inner_optimizer.loss_scale_factor
        return 1.0 if factor is None else factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if hasattr(self, "inner_optimizer"):
            # Keras's LossScaleOptimizer sets None on the optimizer it wraps.
            self.is_scaled_locally = factor is None
            self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return self.inner_optimizer.scale_loss(loss)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[flat_buffer.Gradient, keras.Variable]],
    ) -> keras.Variable:
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[keras.Variable] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        # The last step may have lost weights, and no later step says so.
        finiteness.call_if_not_finite(self._kept(), self._warn_of_loss)
        self.inner_optimizer.finalize_variable_values(var_list)

    def set_weights(self, weights: Iterable[npt.ArrayLike]) -> None:
        # The base class knows only the wrapper's own.
        values = [np.asarray(weight) for weight in weights]
        training_validation.check_shapes("`weights`", self.variables, values)
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)


# What each inner optimizer belongs to. Without a reference that would keep the
# wrapper alive.
_wrappers: weakref.WeakKeyDictionary[
    keras.optimizers.Optimizer, weakref.ref[OptimizerWrapper]
] = weakref.WeakKeyDictionary()


def _take(
    inner_optimizer: keras.optimizers.Optimizer, wrapper: OptimizerWrapper
) -> None:
    """Makes an inner optimizer that of a wrapper, or raises an error.

    Two wrappers would share the count of steps and the momentum.
    """
    of_inner = _wrappers.get(inner_optimizer)
    other = of_inner() if of_inner else None
    if other is not None:
        raise ValueError(
            "`inner_optimizer` must be wrapped once only, because its state "
            "belongs to the steps of its wrapper: make a new one for each. "
            f"Received: inner_optimizer={inner_optimizer!r}, which "
            f"`{other.name}` wraps already"
        )
    _wrappers[inner_optimizer] = weakref.ref(wrapper)


def build_once_for_all_replicas(
    optimizer: keras.optimizers.Optimizer, build: Callable[[], None]
) -> None:
    """Calls `build` in the scope of the optimizer's strategy.

    Args:
        optimizer: A Keras optimizer.
        build: Function of no arguments, which creates the variables.
    """

    def build_in_scope(_: tf.distribute.Strategy | None = None) -> None:
        # Variables are lifted out of any graph, because the first step may be
        # taken anywhere.
        with tf.init_scope(), keras_internals.strategy_of(optimizer).scope():
            build()

    replica = tf.distribute.get_replica_context()
    if replica is None:
        build_in_scope()
    else:
        # The replicas meet here, and one of them builds for all.
        replica.merge_call(build_in_scope)
