"""The part of every wrapper that saves and loads, for Keras and TensorFlow."""

import abc
from collections.abc import Mapping
from collections.abc import MutableMapping
import copy
from typing import Any
from typing import Self
import warnings

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import error_feedback
from tf_regtopk import keras_internals
from tf_regtopk import training_validation
from tf_regtopk.log import logger
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files


class WrapperSaving(
    keras_internals.CheckpointedAsInner, keras.optimizers.Optimizer, abc.ABC
):
    """Saves the state of an aggregation with the inner optimizer's variables.

    A subclass says in `save_state` and `load_state` what the aggregation keeps.
    Keras saves it all by `save_own_variables`, and `tf.train.Checkpoint` by a
    child that `_save_with_checkpoints` adds.
    """

    inner_optimizer: keras.optimizers.Optimizer
    _skipped_steps: keras.Variable
    # True for one that version 0.1.0 has saved.
    _lets_inner_accumulate: bool = False

    @abc.abstractmethod
    def save_state(self) -> saved_state.SavedState:
        """Returns the aggregation's state, a `saved_state.SavedState`."""

    def state_for_checkpoint(self) -> saved_state.SavedState:
        """The state that `tf.train.Checkpoint` saves beside the variables."""
        return self.save_state()

    @abc.abstractmethod
    def load_state(self, saved: saved_state.SavedState) -> None:
        """Loads a `saved_state.SavedState`, or raises and changes nothing."""

    @abc.abstractmethod
    def _clear_state(self) -> None:
        """Gives the aggregation's state the values of a new optimizer."""

    @property
    def counters(self) -> list[keras.Variable]:
        """The variables of the wrapper's own that change: steps and skips."""
        return [self._iterations, self._skipped_steps]

    def start_without_state(self) -> None:
        """Starts as if new, because only the inner optimizer was saved."""
        logger.warning(
            "Optimizer '%s' goes on from what was saved without its residual "
            "errors, as by a plain optimizer: these start at zero",
            self.name,
        )
        if self.built:
            self._clear_state()
            for counter in self.counters:
                counter.assign(0)

    def save_own_variables(
        self, store: MutableMapping[str, np.ndarray]
    ) -> None:
        if self.built:
            saved = self.save_state()
            worker_files.warn_if_alone(saved)
            arrays = saved_state.to_arrays(
                saved, [v.numpy() for v in self.variables]
            )
            for name, array in arrays.items():
                store[name] = array

    def load_own_variables(self, store: Mapping[str, np.ndarray]) -> None:
        arrays = {name: store[name] for name in store.keys()}  # noqa: SIM118
        if not self.built:
            # Keras passes over the inner optimizer here too, because it would
            # warn of that one as well.
            leave_saving_to_wrapper(self.inner_optimizer)
            if arrays:
                warnings.warn(
                    f"The optimizer '{self.name}' is not built yet, and loads "
                    "nothing of what was saved. To go on from there call "
                    "`optimizer.build(model.trainable_variables)` first.",
                    stacklevel=2,
                )
            return
        if not arrays:
            warnings.warn(
                f"The saved optimizer '{self.name}' was not built yet, and "
                "holds nothing: this one stays as it is.",
                stacklevel=2,
            )
            return
        # All is checked before anything is assigned.
        if self.could_load(arrays):
            self.start_without_state()
            inner_variables = self.inner_optimizer.variables
            if len(arrays) > len(inner_variables):
                logger.warning(
                    "The momentum that was saved is dropped, because the %s of "
                    "'%s' has none",
                    type(self.inner_optimizer).__name__,
                    self.name,
                )
            for i, variable in enumerate(inner_variables):
                variable.assign(arrays[str(i)])
            return
        saved, values = saved_state.from_arrays(arrays)
        training_validation.check_loaded_shapes(self.variables, values)
        self.load_state(saved)
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def could_load(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Returns whether a plain optimizer like the inner one has saved these.

        An array more for each trainable variable may follow, the momentum of a
        plain SGD, because `methods` move momentum to the replicas; or two of
        Adam, where that was moved.
        """
        if arrays.keys() != {str(i) for i in range(len(arrays))}:
            return False
        shapes = [arrays[str(i)].shape for i in range(len(arrays))]
        own = [tuple(v.shape) for v in self.inner_optimizer.variables]
        of_each = [tuple(v.shape) for v in self._trainable_variables]
        moved: list[list[tuple[int, ...]]] = [[], of_each]
        rule = getattr(self, "error_feedback", None)
        if isinstance(rule, error_feedback.LocalAdam):
            # One variable after the other, or all of one kind first.
            moved += [[s for s in of_each for _ in range(2)], 2 * of_each]
        return shapes in [own + following for following in moved]

    def get_config(self) -> dict[str, Any]:
        # The base class's config is left out, because its arguments belong to
        # the inner optimizer.
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
        }

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
    ) -> Self:
        config = copy.deepcopy(config)  # Keras writes into nested ones.
        for name, value in config.items():
            if isinstance(value, dict):
                config[name] = keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
        parts = _parts(config["inner_optimizer"])
        accumulates = [part.gradient_accumulation_steps for part in parts]
        # Version 0.1.0 let the inner optimizer accumulate, so files may say so.
        if "accumulation_steps" not in config:
            for part in parts:
                part.gradient_accumulation_steps = None
        wrapper = cls(**config)
        for part, steps in zip(parts, accumulates, strict=True):
            part.gradient_accumulation_steps = steps
        wrapper._lets_inner_accumulate = any(accumulates)
        return wrapper

    def _save_with_checkpoints(self) -> None:
        """Gives the state to `tf.train.Checkpoint`, once it is created."""
        # TensorFlow tracks the child, and restores at once what it has for it.
        setattr(self, keras_internals.CHECKPOINT_KEY, _CheckpointedState(self))


class _CheckpointedState(tf.train.experimental.PythonState):
    """Saves and restores a wrapper's state with `tf.train.Checkpoint`."""

    def __init__(self, wrapper: WrapperSaving) -> None:
        self._wrapper = wrapper

    def serialize(self) -> bytes:
        saved = self._wrapper.state_for_checkpoint()
        worker_files.warn_if_alone(saved)
        return saved_state.to_bytes(
            saved, [counter.numpy() for counter in self._wrapper.counters]
        )

    def deserialize(self, string_value: bytes) -> None:
        saved, values = saved_state.from_bytes(string_value)
        self._wrapper.load_state(saved)
        # Version 0.1.0 stored the counters as variables, which TensorFlow
        # restores.
        if values:
            for counter, value in zip(
                self._wrapper.counters, values, strict=True
            ):
                counter.assign(value)


def leave_saving_to_wrapper(
    inner_optimizer: keras.optimizers.Optimizer,
) -> None:
    """Makes Keras pass over the variables, which the wrapper saves and loads.

    Else it would store them twice, and load them even where the wrapper has
    refused what was saved.
    """
    for part in _parts(inner_optimizer):
        part.save_own_variables = part.load_own_variables = lambda store: None


def give_saving_back(inner_optimizer: keras.optimizers.Optimizer) -> None:
    """Lets Keras save and load the variables of a former inner optimizer."""
    for part in _parts(inner_optimizer):
        for name in ("save_own_variables", "load_own_variables"):
            if name in vars(part):
                delattr(part, name)


def _parts(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """An optimizer, and those of which a `MultiOptimizer` consists."""
    return [optimizer, *getattr(optimizer, "optimizers", ())]
