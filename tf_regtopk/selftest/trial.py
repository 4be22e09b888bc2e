"""Steps of an optimizer on a machine's devices, and checks of the steps.

The gradients are whole numbers and the learning rate is a power of two, so that
sums of gradients are exact in any order, and devices of any kind can be
compared.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

SHAPES = ((67, 31), (1013,))
LEARNING_RATE = 0.125
NUM_STEPS = 3

# Results that are not exact may differ by this share of the largest number.
TOLERANCE = 1e-5


class CheckError(Exception):
    """A rule that did not hold, in words."""


class SkippedError(Exception):
    """The reason in words why this machine cannot run a case."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that checks run on.

    Args:
        names: Tuple of names such as `"GPU:0"`, one for each replica.
        cpus: Tuple of the names of as many logical CPUs, for comparison.
        quick: True if checks leave out cases that others cover in part.
        size: J of the measured step.
        settings: Settings of the process, for the workers that it starts.
    """

    names: tuple[str, ...]
    cpus: tuple[str, ...]
    quick: bool = False
    size: int = 1_000_000
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> Literal["CPU", "GPU"]:
        """Kind of the devices, `"CPU"` or `"GPU"`."""
        return "GPU" if self.names[0].startswith("GPU:") else "CPU"

    @property
    def plain(self) -> tf.distribute.Strategy:
        """The default strategy, which takes the first device."""
        return tf.distribute.get_strategy()

    @functools.cached_property
    def one(self) -> tf.distribute.Strategy:
        """A strategy of the first device."""
        return tf.distribute.OneDeviceStrategy(f"/{self.names[0]}")

    @functools.cached_property
    def all(self) -> tf.distribute.Strategy:
        """The strategy of all devices; TensorFlow allows one in a process."""
        return tf.distribute.MirroredStrategy(list(self.names))

    @functools.cached_property
    def on_cpus(self) -> tf.distribute.Strategy:
        """A strategy of as many CPUs, without the collectives of `all`."""
        return tf.distribute.MirroredStrategy(
            list(self.cpus),
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        )


def configure(
    kind: Literal["CPU", "GPU"], memory_limit: int | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Makes at least two devices of a kind, and as many CPUs.

    The call must come before TensorFlow makes its devices.

    Args:
        kind: `"CPU"` or `"GPU"`.
        memory_limit: Megabytes of each part of a GPU that is split.

    Returns:
        `(names, cpus)`, the names of the devices and of as many logical CPUs.
    """
    [cpu] = tf.config.list_physical_devices("CPU")
    physical = tf.config.list_physical_devices(kind)
    num_devices = max(2, len(physical))
    if kind == "GPU" and len(physical) == 1:
        split(physical[0], num_devices, memory_limit)
    split(cpu, num_devices)
    return (
        tuple(f"{kind}:{i}" for i in range(num_devices)),
        tuple(f"CPU:{i}" for i in range(num_devices)),
    )


def split(
    physical_device: tf.config.PhysicalDevice,
    num_parts: int,
    memory_limit: int | None = None,
) -> None:
    """Splits a physical device into several logical devices."""
    part = tf.config.LogicalDeviceConfiguration(memory_limit=memory_limit)
    tf.config.set_logical_device_configuration(
        physical_device, [part] * num_parts
    )


class Trial:
    """An optimizer under a strategy, and steps with given gradients.

    Args:
        strategy: A `tf.distribute.Strategy`.
        sparsifier: The sparsifier of the `SparsifiedOptimizer`.
        **kwargs: Further arguments of the `SparsifiedOptimizer`.
        shapes: The shapes of the variables.
        variables: List of Keras variables; by default zeros of these shapes.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        sparsifier: tf_regtopk.Sparsifier | None = None,
        *,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        variables: list[keras.Variable] | None = None,
        **kwargs: Any,
    ) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.variables = variables or [
                keras.Variable(np.zeros(shape, np.float32)) for shape in shapes
            ]
            self.optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(LEARNING_RATE), sparsifier, **kwargs
            )
            self.optimizer.build(self.variables)
        self.trace()

    def trace(self) -> None:
        """Makes the function of a step anew, which `set_density` requires."""
        self._step = step_function(
            self.strategy, self.optimizer, self.variables
        )

    def step(self, gradients: np.ndarray) -> None:
        """Takes a step with gradients `[N, J]`."""

        def of_replica(
            context: tf.distribute.experimental.ValueContext,
        ) -> tf.Tensor:
            with tf.device("CPU:0"):
                return tf.constant(gradients[context.replica_id_in_sync_group])

        self._step(
            self.strategy.experimental_distribute_values_from_function(
                of_replica
            )
        )

    def weights(self) -> np.ndarray:
        """Returns the weights of this process's replicas, `[replicas, J]`."""
        return np.array(
            [
                np.concatenate([v.numpy().ravel() for v in values])
                for values in zip(
                    *(
                        self.strategy.experimental_local_results(v.value)
                        for v in self.variables
                    ),
                    strict=True,
                )
            ]
        )

    def state(self) -> list[np.ndarray]:
        """Returns all arrays that the replicas keep between steps."""
        return [
            array
            for state in states_of(self.optimizer)
            for arrays in state.local_arrays()
            for array in arrays
        ]

    def feedback(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the sums of the local arrays, and the shared arrays."""
        replicas = states_of(self.optimizer)[0].local_arrays()
        num_local = self.optimizer.error_feedback.num_local
        local = [
            np.asarray(np.sum(arrays, axis=0, dtype=np.float64))
            for arrays in zip(*(r[:num_local] for r in replicas), strict=True)
        ]
        return local, replicas[0][num_local:]

    def counts(self) -> set[tuple[int, int]]:
        """Returns the set of `(iterations, skipped steps)` of all replicas."""
        return set(
            zip(
                *(
                    [
                        int(value.numpy())
                        for value in self.strategy.experimental_local_results(
                            counter.value
                        )
                    ]
                    for counter in (
                        self.optimizer.iterations,
                        self.optimizer.skipped_steps,
                    )
                ),
                strict=True,
            )
        )


def states_of(optimizer: tf_regtopk.SparsifiedOptimizer) -> tuple[Any, Any]:
    """Returns the replicas' feedback state and the sparsifier's memory.

    Nothing else here looks into the optimizer.
    """
    exchange = optimizer._partition
    return exchange.feedback_state, exchange.memory


def state_devices(trial: Trial) -> list[tuple[str, list[str]]]:
    """Returns the dtype and the devices of each variable of the state."""
    return [
        (
            variable.dtype.name,
            [
                device_name(part.device)
                for part in trial.strategy.experimental_local_results(variable)
            ],
        )
        for state in states_of(trial.optimizer)
        for variable in tf.nest.flatten(state._variables)
    ]


def device_name(device: str) -> str:
    """Shortens the name of a device to a name such as `"GPU:0"`."""
    spec = tf.DeviceSpec.from_string(device)
    return f"{spec.device_type}:{spec.device_index}"


def step_function(
    strategy: tf.distribute.Strategy,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
) -> Callable[[Any], None]:
    """Makes a function that takes a step with each replica's gradient `[J]`."""
    shapes = [tuple(variable.shape) for variable in variables]
    sizes = [math.prod(shape) for shape in shapes]

    def step(flat: tf.Tensor) -> None:
        def take_step(flat: tf.Tensor) -> None:
            parts = tf.split(flat, sizes)
            optimizer.apply(
                [
                    tf.reshape(part, shape)
                    for part, shape in zip(parts, shapes, strict=True)
                ],
                variables,
            )

        strategy.run(take_step, args=(flat,))

    return tf.function(step, autograph=False)


def make_gradients(
    num_replicas: int,
    num_steps: int = NUM_STEPS,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
) -> np.ndarray:
    """Makes whole numbers for each step and replica, `[steps, N, J]`."""
    size = sum(math.prod(shape) for shape in shapes)
    rng = np.random.default_rng(seed)
    return rng.integers(
        -(2**16), 2**16, (num_steps, num_replicas, size)
    ).astype(np.float32)


def run(trial: Trial, gradients: np.ndarray) -> np.ndarray:
    """Takes steps, and checks that the replicas agree after each step.

    Returns:
        The weights before the first step and after each step, `[steps + 1, J]`.

    Raises:
        CheckError: If replicas differ, or weights are not finite or unchanged.
    """
    [before, *_] = trial.weights()
    seen = [before]
    for number, gradient in enumerate(gradients, start=1):
        trial.step(gradient)
        first, *others = trial.weights()
        if not np.isfinite(first).all():
            raise CheckError(f"weights are not finite after step {number}")
        if np.array_equal(first, seen[-1]):
            raise CheckError(f"step {number} has changed no weight")
        for replica, other in enumerate(others, start=1):
            expect_same(
                f"weights of replica {replica} after step {number}",
                other,
                first,
                "those of replica 0",
            )
        seen.append(first)
    steps = int(trial.optimizer.iterations.numpy())
    if trial.counts() != {(steps, 0)}:
        raise CheckError(
            "each replica must have taken all steps and skipped none: "
            f"(iterations, skipped_steps) are {sorted(trial.counts())}"
        )
    return np.array(seen)


def expect_same(
    name: str, actual: np.ndarray, expected: np.ndarray, of_what: str
) -> None:
    """Raises `CheckError` unless two arrays agree to the bit."""
    differ = actual != expected
    if differ.any():
        at = np.flatnonzero(differ)[0]
        raise CheckError(
            f"{name} differ from {of_what} in {differ.sum()} of {differ.size}: "
            f"entry {at} is {actual.ravel()[at]}, not {expected.ravel()[at]}"
        )


def expect_close(
    name: str, actual: np.ndarray, expected: np.ndarray, of_what: str
) -> None:
    """Raises `CheckError` unless two arrays agree except for rounding."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    limit = TOLERANCE * max(np.abs(expected).max(), 1e-30)
    if not error.max() <= limit:  # NaN is an error, too.
        at = np.argmax(error)
        raise CheckError(
            f"{name} differ from {of_what} by up to {error.max():.3g}: entry "
            f"{at} is {np.ravel(actual)[at]}, not {np.ravel(expected)[at]}"
        )


def expect_balance(
    trial: Trial, gradients: np.ndarray, weights: np.ndarray
) -> None:
    """Raises `CheckError` if a gradient, or a part of it, has got lost.

    The applied part and the part that is held back make up all gradients, if
    the rule of error feedback promises that. A sum that every replica keeps is
    the sum of the replicas' own arrays.
    """
    rule = trial.optimizer.error_feedback
    local, shared = trial.feedback()
    if not isinstance(
        rule,
        (tf_regtopk.Accumulate, tf_regtopk.EF21, tf_regtopk.LearnedShift),
    ):
        return
    is_at_once = getattr(rule, "at_once", False)
    if not isinstance(rule, tf_regtopk.EF21) and (
        is_at_once or not rule.momentum
    ):
        total = gradients.sum(axis=(0, 1), dtype=np.float64)
        if is_at_once:
            total /= 1 - rule.momentum
        held_back = np.zeros_like(total)
        # Only the first entries are held back, because the variables that are
        # exchanged densely are the last ones.
        held_back[: local[0].size] = local[0]
        expect_close(
            "what was applied and what is held back",
            (weights[0] - weights[-1]) / LEARNING_RATE + held_back,
            total,
            "the sum of all gradients",
        )
    if not isinstance(rule, tf_regtopk.Accumulate):
        shift = 0 if isinstance(rule, tf_regtopk.EF21) else 1
        expect_close(
            "the shifts of all replicas",
            local[shift],
            shared[0],
            "the sum of them that each replica keeps",
        )


def expect_sparse(trial: Trial, weights: np.ndarray) -> None:
    """Raises `CheckError` if a step changed more weights than were sent."""
    rule = trial.optimizer.error_feedback
    if not isinstance(rule, (tf_regtopk.Accumulate, tf_regtopk.NoFeedback)):
        return
    report = trial.optimizer.wire_report()
    most = (
        report.num_selected * report.num_replicas
        + report.dense_below_bytes // 4
    )
    changed = np.count_nonzero(np.diff(weights, axis=0), axis=1).max()
    if changed > most:
        raise CheckError(
            f"a step has changed {changed} weights, where all replicas "
            f"together may send {most}"
        )
