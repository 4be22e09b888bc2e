"""Local accumulation: several batches, and one exchange of their mean.

    each batch but the last of m:   A = A + g                  nothing is sent
    the last:                       take_step((A + g) / m)
                                    A = 0                      taken or skipped

Every replica has an A of its own. All replicas count batches alike, so that
they take the same branch without having to agree on it. A number that is not
finite stays in A, and is found in the one step that it belongs to.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any
import zlib

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import branches
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology
from tf_regtopk.saving import resuming
from tf_regtopk.saving import saved_state
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import variable_rules

# Of `_pattern`, before any batch of an accumulation is known.
_ANY = 0


class LocalAccumulation:
    """The gradients of some batches of a replica, to be exchanged as one.

    To be created in the scope of the strategy.

    Args:
        variables: List of the trainable variables.
        num_batches: Integer m > 1.
    """

    def __init__(
        self, variables: Sequence[keras.Variable], num_batches: int
    ) -> None:
        self.num_batches = num_batches
        self._slots = variable_rules.summed_slots(variables)
        accumulated = [variables[slot] for slot in self._slots]
        self._buffer = flat_buffer.FlatBuffer(
            tuple(tuple(v.shape) for v in accumulated),
            # Sums of narrower gradients would be rounded.
            tuple(
                tf.float64 if v.dtype == "float64" else tf.float32
                for v in accumulated
            ),
        )
        self._sums = replica_state.ReplicaState(
            lambda: tuple(
                tf.zeros(shape, dtype)
                for shape, dtype in zip(
                    self._buffer.shapes, self._buffer.dtypes, strict=True
                )
            ),
            topology.Participants(),  # Replicas, also if workers exchange.
        )
        self._strategy = tf.distribute.get_strategy()
        # int32, which TensorFlow keeps on the host, where branches are taken.
        with keras_internals.initial_values_of_each_worker():
            self._count, self._pattern = (
                tf.Variable(
                    0,
                    trainable=False,
                    dtype=tf.int32,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.NONE,
                )
                for _ in range(2)
            )

    def step(
        self,
        gradients: Sequence[flat_buffer.Gradient],
        take_step: Callable[..., tf.Tensor],
        apply: Callable[[Sequence[flat_buffer.Gradient]], None],
        skip: Callable[[], None],
    ) -> tf.Tensor:
        """Adds the gradients of a batch, or takes a step with the mean.

        To be called in a replica context.

        Args:
            gradients: This replica's gradient of each variable, or None.
            take_step: Function of gradients, `apply` and `skip`, as
                `step.take_step`.
            apply: As of `step.take_step`.
            skip: As of `step.take_step`.

        Returns:
            Scalar bool tensor, False if a step was skipped, the same on every
            replica.
        """
        gradients = self._densify(gradients)
        pattern = _pattern_of(gradients)
        fits = self._fits(pattern)
        if keras_internals.in_xla_context():
            # XLA drops the check of `_is_last`: the step is skipped instead.
            for slot in self._slots:
                gradient = gradients[slot]
                if gradient is not None:
                    gradients[slot] = tf.where(fits, gradient, math.nan)

        def add(gradients: Sequence[tf.Tensor | None]) -> tf.Tensor:
            for total, gradient in self._pairs(gradients):
                total.assign_add(tf.cast(gradient, total.dtype))
            self._pattern.assign(pattern)
            self._count.assign_add(1)
            with tf.device("CPU:0"):
                return tf.constant(True)

        # What is kept changes only after the verdict, because a step that
        # raises an error must change nothing. All sums end, because layers may
        # have been frozen since a batch was added.
        def ending(function: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                function(*args)
                for total in self._sums.variables():
                    total.assign(tf.zeros(total.shape, total.dtype))
                self._count.assign(0)

            return call

        def exchange(gradients: Sequence[tf.Tensor | None]) -> tf.Tensor:
            return take_step(self._mean(gradients), ending(apply), ending(skip))

        return branches.call_on_all_replicas(
            self._is_last(fits), exchange, add, (gradients,)
        )

    def ends_with_next_batch(self) -> tf.Tensor:
        """Returns whether the next batch is the last of an accumulation.

        Returns:
            Scalar bool tensor in the memory of the host.
        """
        count = self._count.read_value()
        with tf.device("CPU:0"):
            return tf.equal(count, self.num_batches - 1)

    @property
    def count(self) -> int:
        """The number of batches since the last exchange."""
        [count, *_] = self._strategy.experimental_local_results(self._count)
        return int(count.numpy())

    def save(
        self, replicas: range
    ) -> dict[int, Sequence[Sequence[np.ndarray]]]:
        """Returns `SavedState.accumulated` for the ranks of this process."""
        if not self.count:
            return {}
        arrays = self._sums.local_arrays()
        num_devices = len(arrays) // len(replicas)
        return {
            n: arrays[i * num_devices : (i + 1) * num_devices]
            for i, n in enumerate(replicas)
        }

    def prepare(
        self,
        saved: saved_state.SavedState,
        replicas: range,
        num_replicas: int,
    ) -> Callable[[], None]:
        """Returns a function that loads a `SavedState`, or raises.

        Args:
            saved: `SavedState` with all that these replicas need.
            replicas: Ranks of this process.
            num_replicas: Number of ranks in all.
        """
        count = check_saved(saved, self.num_batches)
        num_local = len(self._sums.replicas)
        initial = [*itertools.chain(*self._sums.initial_arrays())]
        of_replicas = resuming.accumulated_of_replicas(
            saved,
            replicas,
            num_replicas,
            [initial] * (num_local // len(replicas)),
        )

        return functools.partial(
            self._assign, [*itertools.chain(*of_replicas)], count
        )

    def clear(self) -> None:
        """Forgets the batches since the last exchange."""
        initial = [*itertools.chain(*self._sums.initial_arrays())]
        self._assign([initial] * len(self._sums.replicas), count=0)

    def _assign(self, sums: Sequence[Sequence[np.ndarray]], count: int) -> None:
        self._sums.assign_local(sums)
        for variable, value in ((self._count, count), (self._pattern, _ANY)):
            for part in self._strategy.experimental_local_results(variable):
                part.assign(value)

    def _fits(self, pattern: int) -> tf.Tensor:
        """Returns whether the batch has gradients of the right variables."""
        count = self._count.read_value()
        before = self._pattern.read_value()
        with tf.device("CPU:0"):
            return (
                tf.equal(count, 0)
                | tf.equal(before, _ANY)
                | tf.equal(before, pattern)
            )

    def _is_last(self, fits: tf.Tensor) -> tf.Tensor:
        """Returns whether the batch is the last, in the memory of the host."""
        count = self._count.read_value()
        with tf.device("CPU:0"):
            # The raw operation, because the public function adds a branch.
            check = tf.raw_ops.Assert(
                condition=fits,
                data=[
                    "With `accumulation_steps` all batches of a step must have "
                    "gradients of the same variables: freeze layers after an "
                    "exchange, or call `optimizer.discard_accumulated()` "
                    "before. Received: a batch with gradients of others than "
                    "the batch before, number",
                    count,
                ],
            )
            with tf.control_dependencies([check] if check is not None else []):
                return self.ends_with_next_batch()

    def _densify(
        self, gradients: Sequence[flat_buffer.Gradient]
    ) -> list[flat_buffer.Gradient]:
        dense = list(gradients)
        of_slots = self._buffer.densify([dense[slot] for slot in self._slots])
        for slot, gradient in zip(self._slots, of_slots, strict=True):
            dense[slot] = gradient
        return dense

    def _pairs(
        self, gradients: Sequence[tf.Tensor | None]
    ) -> list[tuple[tf.Variable, tf.Tensor]]:
        """`(sum, gradient)` of each variable that has a gradient."""
        return [
            (total, gradients[slot])
            for slot, total in zip(
                self._slots, self._sums.variables(), strict=True
            )
            if gradients[slot] is not None
        ]

    def _mean(
        self, gradients: Sequence[tf.Tensor | None]
    ) -> list[tf.Tensor | None]:
        """The mean over the m batches, of which `gradients` are the last."""
        # Gradients of other variables are not added up: the last ones are used.
        means = list(gradients)
        totals = self._sums.variables()
        for slot, total in zip(self._slots, totals, strict=True):
            gradient = gradients[slot]
            if gradient is not None:
                total = total.read_value() + tf.cast(gradient, total.dtype)
                mean = total / self.num_batches
                means[slot] = tf.cast(mean, gradient.dtype)
        return means


def moment_of(accumulation: LocalAccumulation | None) -> dict[str, Any]:
    """The part of a saved moment that tells of an accumulation under way."""
    if accumulation is None or not accumulation.count:
        return {}
    return {"accumulated": [accumulation.count, accumulation.num_batches]}


def check_saved(saved: saved_state.SavedState, num_batches: int) -> int:
    """Returns how many batches were accumulated when a state was saved.

    Raises:
        ValueError: If the accumulation was to be of another number of batches.
    """
    count, saved_batches = saved.moment.get("accumulated", (0, num_batches))
    if saved_batches != num_batches:
        raise ValueError(
            f"`accumulation_steps` must be {saved_batches} to load what was "
            f"saved after {count} of {saved_batches} batches. Received: "
            f"accumulation_steps={num_batches}"
        )
    return int(count)


def _pattern_of(gradients: Sequence[flat_buffer.Gradient]) -> int:
    """A number that tells which variables have a gradient."""
    has_gradient = bytes(gradient is not None for gradient in gradients)
    return zlib.crc32(has_gradient) >> 1 | 1  # Positive, and not `_ANY`.
