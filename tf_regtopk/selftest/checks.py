"""The checks of `python -m tf_regtopk.selftest`, run in a process of their own.

    python -m tf_regtopk.selftest.checks SETTINGS

Each check is a generator of cases, `(name, function)`. A function returns its
findings as text, or None, and raises an error if something is wrong.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import gpus as gpus_lib
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest import workers as workers_lib
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import SkippedError
from tf_regtopk.selftest.trial import Trial

# A case of a check: its name, and the function that runs it.
Case = tuple[str, Callable[[], str | None]]
# A comparison: the name, the actual and the expected array, and of what it is.
Expect = Callable[[str, np.ndarray, np.ndarray, str], None]

DENSITY = 0.01
# The second of the two variables is exchanged densely with these arguments.
_SOME_DENSE: dict[str, Any] = {"dense_below": 2000}

SPARSIFIERS = {
    "RegTopK": tf_regtopk.RegTopK(DENSITY),
    'RegTopK(denominator="current")': tf_regtopk.RegTopK(
        DENSITY, denominator="current"
    ),
    "TopK": tf_regtopk.TopK(DENSITY),
    "RandomK": tf_regtopk.RandomK(DENSITY),
    "Dense": tf_regtopk.Dense(),
}
# The codecs are in pairs, without the index codec and value codec of `Codec()`.
CODECS: tuple[
    tuple[
        Literal["int32", "elias_fano", "golomb", "bitmap"],
        Literal["bfloat16", "float16", "natural", "uniform", "sign", "ternary"],
    ],
    ...,
] = (
    ("int32", "bfloat16"),
    ("elias_fano", "float16"),
    ("golomb", "natural"),
    ("bitmap", "uniform"),
    ("elias_fano", "sign"),
    ("golomb", "ternary"),
)
# The default rule `Accumulate()` is left out, because other checks have it.
RULES = {
    "Accumulate(momentum, factor_masking)": tf_regtopk.Accumulate(
        momentum=0.5, factor_masking=True
    ),
    "NoFeedback": tf_regtopk.NoFeedback(),
    "EF21": tf_regtopk.EF21(),
    "EF21(momentum)": tf_regtopk.EF21(momentum=0.5),
    "LearnedShift": tf_regtopk.LearnedShift(),
    "LearnedShift(momentum)": tf_regtopk.LearnedShift(momentum=0.5),
    "CompressedDownlink": tf_regtopk.CompressedDownlink(),
}


def run_case(strategy: tf.distribute.Strategy, **kwargs: Any) -> None:
    """Takes steps, and checks that all rules hold."""
    trial = Trial(strategy, **kwargs)
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)


# ----- The machine -----


def environment(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks TensorFlow's devices, and that XLA compiles for each device."""

    def versions() -> str:
        found: dict[str, str | None] = {**describe_software()}
        if devices.kind == "GPU":
            found["driver"] = gpus_lib.driver_version()
        return ", ".join(f"{name} {value}" for name, value in found.items())

    def compiles(device: str) -> None:
        numbers = np.arange(1000, dtype=np.float32)
        double = tf.function(lambda x: 2 * x, jit_compile=True, autograph=False)
        with tf.device(f"/{device}"):
            result = double(tf.identity(tf.constant(numbers)))
        place = trial_lib.device_name(result.device)
        if place != device:
            raise CheckError(f"a compiled function ran on {place}")
        trial_lib.expect_same(
            "doubled numbers", result.numpy(), 2 * numbers, "2x"
        )

    yield "versions", versions
    for device in devices.names:
        yield f"XLA on {device}", functools.partial(compiles, device)


def describe_software() -> dict[str, str]:
    """Returns the versions in use, by name."""
    found = {
        "tf_regtopk": tf_regtopk.__version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "Python": platform.python_version(),
    }
    build = tf.sysconfig.get_build_info()
    for name, key in (("CUDA", "cuda_version"), ("cuDNN", "cudnn_version")):
        if key in build:  # TensorFlow was built for these versions.
            found[name] = str(build[key])
    return found


def describe_gpus() -> list[str]:
    """Describes in words each GPU that TensorFlow sees."""
    found = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        name = details.get("device_name", "GPU")
        capability = details.get("compute_capability", ())
        found.append(f"{name} ({'.'.join(map(str, capability))})")
    return found


# ----- One step, in all its forms -----


def one_device(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks all parts on the first device, without and with a strategy."""
    forms = {
        "RegTopK, float32, Accumulate": {},
        "TopK, bfloat16, factor masking, per variable": dict(
            sparsifier=SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="bfloat16"),
            error_feedback=RULES["Accumulate(momentum, factor_masking)"],
            scope="per_variable",
        ),
        "RandomK, float16, NoFeedback, dense_below": dict(
            sparsifier=SPARSIFIERS["RandomK"],
            codec=tf_regtopk.Codec(values="float16"),
            error_feedback=RULES["NoFeedback"],
            **_SOME_DENSE,
        ),
        "Dense, natural, EF21": dict(
            sparsifier=SPARSIFIERS["Dense"],
            codec=tf_regtopk.Codec(values="natural"),
            error_feedback=RULES["EF21"],
        ),
        'RegTopK(denominator="current"), uniform, EF21(momentum)': dict(
            sparsifier=SPARSIFIERS['RegTopK(denominator="current")'],
            codec=tf_regtopk.Codec(values="uniform"),
            error_feedback=RULES["EF21(momentum)"],
        ),
        "TopK, sign, LearnedShift": dict(
            sparsifier=SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="sign"),
            error_feedback=RULES["LearnedShift"],
        ),
        "RegTopK, ternary, LearnedShift(momentum)": dict(
            codec=tf_regtopk.Codec(values="ternary"),
            error_feedback=RULES["LearnedShift(momentum)"],
        ),
        "TopK, ternary, CompressedDownlink": dict(
            sparsifier=SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="ternary"),
            error_feedback=RULES["CompressedDownlink"],
        ),
    }
    places = (
        ("without a strategy", devices.plain),
        ("OneDeviceStrategy", devices.one),
    )
    for number, (name, form) in enumerate(forms.items()):
        form.setdefault("sparsifier", SPARSIFIERS["RegTopK"])
        # The forms take turns, because each in both places would take long;
        # only the default runs in both.
        for how, strategy in (
            places if number == 0 else places[number % 2 :][:1]
        ):
            if not devices.quick or number == 2:
                yield (
                    f"{name}, {how}",
                    functools.partial(run_case, strategy, **form),
                )
    for how, strategy in places:
        if not devices.quick:
            yield (
                f"set_density, {how}",
                functools.partial(change_density, strategy),
            )


def sparsifiers(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks each sparsifier on all devices."""
    for name, sparsifier in SPARSIFIERS.items():
        if not devices.quick or name == "RegTopK":
            yield (
                name,
                functools.partial(run_case, devices.all, sparsifier=sparsifier),
            )


def codecs(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks each index codec and each value codec on all devices."""
    for number, (indices, values) in enumerate(CODECS):
        if not devices.quick or number == 3:
            yield (
                f'Codec("{indices}", "{values}")',
                functools.partial(
                    run_case,
                    devices.all,
                    sparsifier=SPARSIFIERS["TopK"],
                    codec=tf_regtopk.Codec(indices, values),
                ),
            )


def error_feedback(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks each rule of error feedback on all devices."""
    for name, rule in RULES.items():
        if not devices.quick or name == "LearnedShift":
            yield (
                name,
                functools.partial(
                    run_case,
                    devices.all,
                    sparsifier=SPARSIFIERS["TopK"],
                    error_feedback=rule,
                ),
            )


def options(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks the options of `SparsifiedOptimizer` on all devices."""
    if not devices.quick:
        yield (
            'scope="per_variable"',
            functools.partial(select_per_variable, devices.all),
        )
    yield "dense_below", functools.partial(exchange_some_densely, devices.all)
    if not devices.quick:
        yield (
            'exchange="dense"',
            functools.partial(exchange_densely, devices.all),
        )
        yield "set_density", functools.partial(change_density, devices.all)
        yield (
            "accumulation_steps",
            functools.partial(accumulate_locally, devices.all),
        )


def select_per_variable(strategy: tf.distribute.Strategy) -> None:
    """Checks that each variable sends its own share."""
    trial = Trial(strategy, SPARSIFIERS["TopK"], scope="per_variable")
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    # The gradient of the first variable is made small, because by magnitude
    # alone nothing of it would be sent.
    cut = math.prod(trial_lib.SHAPES[0])
    gradients[:, :, :cut] = np.sign(gradients[:, :, :cut])
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)
    if not (weights[1][:cut] != weights[0][:cut]).any():
        raise CheckError("nothing was sent of the first variable")


def exchange_some_densely(strategy: tf.distribute.Strategy) -> None:
    """Checks that small variables get the whole sum of the gradients."""
    trial = Trial(strategy, SPARSIFIERS["RegTopK"], **_SOME_DENSE)
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)
    cut = math.prod(trial_lib.SHAPES[0])
    total = gradients.sum(axis=(0, 1))
    trial_lib.expect_same(
        "weights of the variable exchanged densely",
        weights[-1][cut:],
        -trial_lib.LEARNING_RATE * total[cut:],
        "those of the summed gradients",
    )


def exchange_densely(strategy: tf.distribute.Strategy) -> None:
    """Checks that all variables get the whole sum of the gradients."""
    trial = Trial(strategy, SPARSIFIERS["RegTopK"], exchange="dense")
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_same(
        "weights",
        weights[-1],
        -trial_lib.LEARNING_RATE * gradients.sum(axis=(0, 1)),
        "those of the summed gradients",
    )


class _InTwoBatches(Trial):
    """Takes each step with two batches, of which the gradients' mean counts."""

    def step(self, gradients: np.ndarray) -> None:
        before = self.weights()
        super().step(3 * gradients)
        trial_lib.expect_same(
            "weights after a batch that is only added up",
            self.weights(),
            before,
            "those before",
        )
        super().step(-gradients)


def accumulate_locally(strategy: tf.distribute.Strategy) -> None:
    """Checks that some batches are only added up, and that nothing is lost."""
    trial = _InTwoBatches(
        strategy, SPARSIFIERS["RegTopK"], accumulation_steps=2
    )
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)


def change_density(strategy: tf.distribute.Strategy) -> None:
    """Checks that `set_density` sends more, and that nothing is lost."""
    trial = Trial(strategy, SPARSIFIERS["RegTopK"])
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    before = trial_lib.run(trial, gradients[:1])
    density = 0.25
    trial.optimizer.set_density(density)
    trial.trace()
    after = trial_lib.run(trial, gradients[1:])
    trial_lib.expect_balance(trial, gradients, np.concatenate([before, after]))
    changed = np.count_nonzero(after[1] != after[0])
    k = round(density * after.shape[1])
    if changed < k:
        raise CheckError(
            f"a step has changed {changed} weights, where {k} must be sent"
        )


# ----- Agreement of the replicas -----


def placement(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that the state of a replica lies on its device."""
    rules: dict[str, dict[str, Any]] = {
        "RegTopK, Accumulate(momentum)": {
            "error_feedback": tf_regtopk.Accumulate(momentum=0.5)
        },
        "RegTopK, EF21": {"error_feedback": tf_regtopk.EF21()},
    }
    for name, form in rules.items():
        yield name, functools.partial(expect_places, devices, **form)


def expect_places(devices: trial_lib.Devices, **kwargs: Any) -> None:
    """Raises `CheckError` if a variable lies on another device."""
    for strategy, names in (
        (devices.all, devices.names),
        (devices.one, devices.names[:1]),
    ):
        trial = Trial(strategy, SPARSIFIERS["RegTopK"], **kwargs)
        for when in ("built", "set_density"):
            for dtype, places in trial_lib.state_devices(trial):
                if tuple(places) != tuple(names):
                    raise CheckError(
                        f"a {dtype} variable of the replicas on {names} lies "
                        f"on {places} ({when})"
                    )
            trial.optimizer.set_density(0.25)


def same_as_cpu(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that all devices compute the same results as CPUs."""
    forms: dict[str, tuple[Expect, dict[str, Any]]] = {
        "TopK, to the bit": (
            trial_lib.expect_same,
            {"sparsifier": SPARSIFIERS["TopK"]},
        ),
        "RandomK by variable, golomb, bfloat16, to the bit": (
            trial_lib.expect_same,
            {
                "sparsifier": SPARSIFIERS["RandomK"],
                "scope": "per_variable",
                "codec": tf_regtopk.Codec("golomb", "bfloat16"),
            },
        ),
        f"RegTopK, within {trial_lib.TOLERANCE:g}": (
            trial_lib.expect_close,
            {"sparsifier": SPARSIFIERS["RegTopK"]},
        ),
        f"RegTopK, LearnedShift(momentum), within {trial_lib.TOLERANCE:g}": (
            trial_lib.expect_close,
            {
                "sparsifier": SPARSIFIERS["RegTopK"],
                "error_feedback": RULES["LearnedShift(momentum)"],
            },
        ),
    }
    for name, (expect, form) in forms.items():
        # One form is enough on CPUs, because there the two sides differ only in
        # their communication.
        if devices.kind == "GPU" or name.startswith("TopK"):
            yield (
                name,
                functools.partial(compare_with_cpu, devices, expect, form),
            )


def compare_with_cpu(
    devices: trial_lib.Devices,
    expect: Expect,
    form: dict[str, Any],
) -> None:
    """Raises `CheckError` if weights or state differ from the CPUs' results."""
    found = []
    gradients = trial_lib.make_gradients(len(devices.names))
    for strategy in (devices.all, devices.on_cpus):
        trial = Trial(strategy, **form)
        weights = trial_lib.run(trial, gradients)
        found.append(
            [*weights, *trial_lib.states_of(trial.optimizer)[0].local_arrays()]
        )
    for number, (ours, cpus) in enumerate(zip(*found, strict=True)):
        if number <= len(gradients):
            expect(f"weights after step {number}", ours, cpus, "those on CPUs")
        else:
            for one, other in zip(ours, cpus, strict=True):
                expect("what a replica keeps", one, other, "that on CPUs")


def repeatable(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that two runs agree to the bit."""
    form = {
        # The value codec rounds stochastically, which must be repeatable too.
        "codec": tf_regtopk.Codec(values="natural"),
        "error_feedback": RULES["LearnedShift(momentum)"],
    }
    yield (
        "RegTopK, natural, LearnedShift(momentum)",
        functools.partial(run_twice, devices.all, **form),
    )


def run_twice(strategy: tf.distribute.Strategy, **kwargs: Any) -> None:
    """Raises `CheckError` if the second of two runs differs."""
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    first, second = (
        trial_lib.run(
            Trial(strategy, SPARSIFIERS["RegTopK"], **kwargs), gradients
        )
        for _ in range(2)
    )
    for number in range(1, len(first)):
        trial_lib.expect_same(
            f"weights after step {number} of the second run",
            second[number],
            first[number],
            "those of the first",
        )


def non_finite(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that no replica takes a step if one has NaN or infinity."""
    for name, value, sparsifier, form in (
        # RandomK does not select infinity first, so that the optimizer has to
        # look for it in the whole gradient.
        ("infinity, RandomK", math.inf, "RandomK", {}),
        ("NaN, RegTopK, dense_below", math.nan, "RegTopK", _SOME_DENSE),
    ):
        if not devices.quick or name == "infinity, RandomK":
            yield (
                name,
                functools.partial(
                    skip_a_step, devices.all, value, sparsifier, **form
                ),
            )


def skip_a_step(
    strategy: tf.distribute.Strategy,
    value: float,
    sparsifier: str,
    **kwargs: Any,
) -> None:
    """Plants a value that is not finite into the second step of three."""
    trial = Trial(strategy, SPARSIFIERS[sparsifier], **kwargs)
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    trial.step(gradients[0])
    weights, state = trial.weights(), trial.state()
    # The entry belongs to the last variable, which is exchanged densely.
    gradients[1, -1, -2] = value
    trial.step(gradients[1])
    expect_counts(trial, iterations=1, skipped=1)
    trial_lib.expect_same("weights", trial.weights(), weights, "those before")
    for after, before in zip(trial.state(), state, strict=True):
        # Bytes are compared, because NaN stands for entries that RegTop-k has
        # not sent yet.
        trial_lib.expect_same(
            "what a replica keeps",
            after.view(np.uint8),
            before.view(np.uint8),
            "that before",
        )
    trial.step(gradients[2])
    expect_counts(trial, iterations=2, skipped=1)
    first, *others = trial.weights()
    for other in others:
        trial_lib.expect_same("weights", other, first, "those of replica 0")
    if not np.isfinite(first).all() or np.array_equal(first, weights[0]):
        raise CheckError("the step after the one skipped must change weights")


def expect_counts(trial: Trial, iterations: int, skipped: int) -> None:
    """Raises `CheckError` unless every replica has counted so many steps."""
    if trial.counts() != {(iterations, skipped)}:
        raise CheckError(
            f"(iterations, skipped_steps) must be ({iterations}, {skipped}) on "
            f"each replica, and are {sorted(trial.counts())}"
        )


@keras.saving.register_keras_serializable(package="tf_regtopk_selftest")
class Scale(keras.layers.Layer):
    """Multiplies and adds entry by entry, without a matrix product."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.factor = self.add_weight(
            shape=input_shape[1:], initializer="ones", name="factor"
        )
        self.offset = self.add_weight(
            shape=input_shape[-1:], initializer="zeros", name="offset"
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs * self.factor + self.offset


_SCALE_SHAPE = (17, 31)


def loss_scale(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that a float16 overflow halves the scale on all replicas."""
    yield (
        "overflow on the last replica",
        functools.partial(overflow, devices.all),
    )


def overflow(strategy: tf.distribute.Strategy) -> None:
    """Lets a gradient exceed float16 in the second step of three."""
    with strategy.scope():
        layer = Scale(dtype="mixed_float16")
        layer.build((None, *_SCALE_SHAPE))
        variables = layer.trainable_variables
        wrapper = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(trial_lib.LEARNING_RATE),
            SPARSIFIERS["RegTopK"],
        )
        optimizer = tf_regtopk.LossScaleOptimizer(wrapper)
        optimizer.build(variables)

    def step(inputs: tf.Tensor) -> None:
        def take_step(inputs: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                outputs = tf.cast(layer(inputs), tf.float32)
                loss = optimizer.scale_loss(tf.reduce_mean(outputs))
            optimizer.apply(tape.gradient(loss, variables), variables)

        strategy.run(take_step, args=(inputs,))

    def read(*variables: keras.Variable) -> list[np.ndarray]:
        """Returns the values of some variables on each replica."""
        by_variable = [
            [
                value.numpy().ravel()
                for value in strategy.experimental_local_results(v.value)
            ]
            for v in variables
        ]
        return [
            np.concatenate(parts) for parts in zip(*by_variable, strict=True)
        ]

    traced_step = tf.function(step, autograph=False)
    num_replicas = strategy.num_replicas_in_sync
    last = num_replicas - 1
    weights = []
    for largest in (1e-3, 1e4, 1e-3):
        traced_step(
            strategy.experimental_distribute_values_from_function(
                lambda context, largest=largest: tf.fill(
                    [1, *_SCALE_SHAPE],
                    tf.constant(
                        largest
                        if context.replica_id_in_sync_group == last
                        else 1e-3,
                        tf.float16,
                    ),
                )
            )
        )
        weights.append(read(*variables))
        scales = [scale.item() for scale in read(optimizer.dynamic_scale)]
        expected = 2.0**15 if len(weights) == 1 else 2.0**14
        if scales != [expected] * num_replicas:
            raise CheckError(
                f"the scale must be {expected:g} on each replica after step "
                f"{len(weights)}, and is {scales}"
            )
        for other in weights[-1][1:]:
            trial_lib.expect_same(
                "weights", other, weights[-1][0], "those of replica 0"
            )
    trial_lib.expect_same(
        "weights after the overflow", weights[1][0], weights[0][0], "before"
    )
    if np.array_equal(weights[2][0], weights[1][0]):
        raise CheckError("the step after the overflow has changed no weight")
    counted = (
        int(wrapper.iterations.numpy()),
        int(wrapper.skipped_steps.numpy()),
    )
    if counted != (2, 1):
        raise CheckError(
            "(iterations, skipped_steps) must be (2, 1) after an overflow, and "
            f"are {counted}"
        )


# ----- Keras -----


def saving(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that training resumes to the bit after saving and loading."""
    for name, strategy in (
        ("all devices", devices.all),
        ("without a strategy", devices.plain),
    ):
        if not devices.quick or strategy is devices.all:
            yield name, functools.partial(save_and_load, strategy)


def save_and_load(strategy: tf.distribute.Strategy) -> None:
    """Saves after two steps, and compares two more with those of a copy."""
    size = math.prod(_SCALE_SHAPE) + _SCALE_SHAPE[-1]
    gradients = trial_lib.make_gradients(
        strategy.num_replicas_in_sync, 4, [(size,)]
    )

    def make_model() -> tuple[keras.Model, Trial]:
        with strategy.scope():
            model = keras.Sequential([keras.Input(_SCALE_SHAPE), Scale()])
            trial = Trial(
                strategy,
                tf_regtopk.RegTopK(0.1),
                variables=model.trainable_variables,
            )
            model.compile(trial.optimizer, "mse")
        return model, trial

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.weights.h5")
        model, trial = make_model()
        trial_lib.run(trial, gradients[:2])
        model.save_weights(path)
        expected = trial_lib.run(trial, gradients[2:])
        model, loaded = make_model()
        model.load_weights(path)
    actual = trial_lib.run(loaded, gradients[2:])
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        trial_lib.expect_same(
            f"weights {number} steps after loading",
            ours,
            theirs,
            "those without saving",
        )


def fit(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks `fit` of a model without matrix products."""
    return _fit_cases(
        devices,
        _SCALE_SHAPE,
        _SCALE_SHAPE,
        lambda: [Scale()],
        # The rate is high because the mean over all entries makes the gradient
        # of each entry small.
        learning_rate=5.0,
        is_first=True,
    )


def fit_dense(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks `fit` of dense layers, which need cuBLAS on GPUs."""
    return _fit_cases(
        devices,
        (8,),
        (3,),
        lambda: [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(3),
        ],
    )


def fit_conv(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks `fit` of convolutions, which need cuDNN on GPUs."""
    return _fit_cases(
        devices,
        (8, 8, 3),
        (4,),
        lambda: [
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(4, 3),
            keras.layers.GlobalAveragePooling2D(),
        ],
    )


def _fit_cases(
    devices: trial_lib.Devices,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    make_layers: Callable[[], list[keras.layers.Layer]],
    learning_rate: float = 0.05,
    is_first: bool = False,
) -> Iterator[Case]:
    for name, strategy in (
        ("all devices", devices.all),
        ("without a strategy", devices.plain),
    ):
        if strategy is devices.all or (is_first and not devices.quick):
            yield (
                name,
                functools.partial(
                    fit_model,
                    strategy,
                    input_shape,
                    output_shape,
                    make_layers,
                    learning_rate,
                ),
            )


def fit_model(
    strategy: tf.distribute.Strategy,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    make_layers: Callable[[], list[keras.layers.Layer]],
    learning_rate: float,
) -> str:
    """Fits a model of given layers, and checks that the model learns."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    num_examples = 16 * strategy.num_replicas_in_sync
    x = rng.standard_normal((num_examples, *input_shape)).astype(np.float32)
    # The target is a mean, because every kind of layer here can learn a mean.
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    y = 0.5 + np.broadcast_to(
        mean.reshape(-1, *[1] * len(output_shape)),
        (num_examples, *output_shape),
    ).astype(np.float32)
    with strategy.scope():
        model = keras.Sequential([keras.Input(input_shape), *make_layers()])
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(learning_rate, momentum=0.9),
                tf_regtopk.RegTopK(0.25),
            ),
            "mse",
        )
    history = model.fit(
        x, y, batch_size=num_examples // 2, epochs=4, verbose=0, shuffle=False
    )
    losses = history.history["loss"]
    if not losses[-1] < 0.95 * losses[0]:
        raise CheckError(f"the loss does not fall: {losses}")
    for variable in model.trainable_variables:
        first, *others = (
            value.numpy()
            for value in strategy.experimental_local_results(variable.value)
        )
        for other in others:
            trial_lib.expect_same(
                f"weights of {variable.path}",
                other,
                first,
                "those of replica 0",
            )
    if int(model.optimizer.skipped_steps.numpy()):
        raise CheckError(
            f"{int(model.optimizer.skipped_steps.numpy())} steps were skipped"
        )
    return f"loss {losses[0]:.3g} to {losses[-1]:.3g}"


# ----- Several workers -----


def workers(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that two workers on this machine agree."""
    for communication in ("AUTO", "NCCL"):
        if communication == "AUTO" or devices.kind == "GPU":
            yield (
                communication,
                functools.partial(
                    workers_lib.workers_agree, devices, communication
                ),
            )


def lost_worker(devices: trial_lib.Devices) -> Iterator[Case]:
    """Checks that a worker terminates after the other one is killed."""
    yield (
        "SIGKILL",
        functools.partial(workers_lib.lost_worker_ends_the_other, devices),
    )


# ----- Time -----


def speed(devices: trial_lib.Devices) -> Iterator[Case]:
    """Measures the time and the memory of a step."""
    strategies = {
        "first device": devices.one,
        f"{len(devices.names)} replicas": devices.all,
    }
    for name, strategy in strategies.items():
        for method in ("sparse", "dense", "unwrapped"):
            if method == "dense" and strategy is devices.one:
                continue  # One replica exchanges nothing.
            yield (
                f"{method}, {name}",
                functools.partial(
                    measure, strategy, method, devices.size, devices.quick
                ),
            )


def measure(
    strategy: tf.distribute.Strategy,
    method: Literal["sparse", "dense", "unwrapped"],
    size: int,
    quick: bool,
) -> str:
    """Times steps without reading anything back in between."""
    gc.collect()
    before = _memory(strategy, "current", reset=True)
    rows = size // 1000
    shapes = [(rows, 999), (size - rows * 999,)]
    with strategy.scope():
        variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
        optimizer = keras.optimizers.SGD(0.1)
        if method != "unwrapped":
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer, tf_regtopk.RegTopK(0.001), exchange=method
            )
        optimizer.build(variables)

    def make_gradient() -> tf.Tensor:
        def make() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            replica = tf.convert_to_tensor(context.replica_id_in_sync_group)
            return tf.random.stateless_normal([size], [7, replica])

        return strategy.run(make)

    step = trial_lib.step_function(strategy, optimizer, variables)
    gradient = tf.function(make_gradient, autograph=False)()

    def wait() -> list[float]:
        return [
            float(value[-1].numpy())
            for value in strategy.experimental_local_results(
                variables[-1].value
            )
        ]

    wait()
    start = time.perf_counter()
    step(gradient)
    wait()
    first = time.perf_counter() - start
    for _ in range(3):
        step(gradient)
    wait()
    seconds, num_steps = [], 2 if quick else 10
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(num_steps):
            step(gradient)
        wait()
        seconds.append((time.perf_counter() - start) / num_steps)
    taken = int(optimizer.iterations.numpy())
    if taken != 4 + 3 * num_steps:
        raise CheckError(f"{taken} of {4 + 3 * num_steps} steps were taken")
    for variable in variables:
        first_replica, *others = strategy.experimental_local_results(
            variable.value
        )
        for other in others:
            trial_lib.expect_same(
                "weights",
                other.numpy(),
                first_replica.numpy(),
                "those of replica 0",
            )
    found = (
        f"J = {size}: first call {first:.1f} s, then "
        f"{1e3 * statistics.median(seconds):.2f} ms a step"
    )
    peak = _memory(strategy, "peak")
    if peak is not None and before is not None:
        gradients = (peak - before) / (4 * size)
        found += f", peak memory {gradients:.1f} gradients"
    return found


def _memory(
    strategy: tf.distribute.Strategy,
    what: Literal["current", "peak"],
    reset: bool = False,
) -> int | None:
    """Returns the bytes in use on the first device, None for a CPU."""
    device = trial_lib.device_name(strategy.extended.worker_devices[0])
    if device.startswith("CPU"):
        return None
    if reset:
        tf.config.experimental.reset_memory_stats(device)
    return tf.config.experimental.get_memory_info(device)[what]


# The checks are in the order of the table.
CHECKS: dict[str, Callable[[trial_lib.Devices], Iterator[Case]]] = {
    check.__name__: check
    for check in (
        environment,
        one_device,
        sparsifiers,
        codecs,
        error_feedback,
        options,
        placement,
        same_as_cpu,
        repeatable,
        non_finite,
        loss_scale,
        saving,
        fit,
        fit_dense,
        fit_conv,
        workers,
        lost_worker,
        speed,
    )
}
# Nothing else runs during these checks, because that would distort their times.
ALONE = frozenset({"speed"})
# These checks start several processes.
OF_WORKERS = frozenset({"workers", "lost_worker"})
QUICK = (
    "environment",
    "one_device",
    "sparsifiers",
    "codecs",
    "error_feedback",
    "placement",
    "non_finite",
    "saving",
    "fit",
)


# ----- The process -----

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERED = re.compile(r"\s*\(\d+\) ")
_PREFACES = ("Graph execution error", "Detected at node", "Stack trace for")


def run_check(
    check: Callable[[trial_lib.Devices], Iterator[Case]],
    devices: trial_lib.Devices,
    report: Callable[[dict[str, Any]], None],
) -> bool:
    """Runs the cases of a check.

    Args:
        check: Function of `CHECKS`.
        devices: `Devices`.
        report: Function of a dict, called before and after each case.

    Returns:
        True if no case failed.
    """
    passed = True
    for name, function in check(devices):
        report({"case": name, "status": "running"})
        start = time.perf_counter()
        outcome: dict[str, Any] = {"case": name, "status": "ok"}
        try:
            outcome["found"] = function()
        except SkippedError as reason:
            outcome.update(status="skipped", found=str(reason))
        except Exception as error:
            passed = False
            outcome.update(
                status="failed",
                found=summary_of(error),
                traceback=traceback.format_exc(),
            )
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        report(outcome)
    return passed


def summary_of(error: Exception) -> str:
    """Joins the lines of an error that matter."""
    lines = []
    for line in _COLOURS.sub("", str(error)).splitlines():
        # A Keras layer lists its arguments at the end.
        if line.startswith("Arguments received by"):
            break
        # Indented lines are left out, because TensorFlow puts the lines of the
        # trace before its message.
        is_indented = line[:1].isspace() and not _NUMBERED.match(line)
        if line and not is_indented and not line.startswith(_PREFACES):
            lines.append(line.strip())
    if not isinstance(error, CheckError):
        lines.insert(0, f"{type(error).__name__}:")
    return " ".join(lines)[:600]


def main(argv: Sequence[str]) -> None:
    """Runs the checks that the settings name.

    The settings are a JSON object: `checks` (names), `output` (a file to which
    a line of JSON is added for each event), `kind`, `memory_limit`, `quick`,
    `size`, `worker_seconds` (within which workers must terminate).
    """
    settings = json.loads(argv[1])
    tf.get_logger().setLevel("ERROR")
    with open(settings["output"], "a", encoding="utf-8") as output:

        def write(**line: Any) -> None:
            print(json.dumps(line), file=output, flush=True)

        gpus = describe_gpus()
        write(
            gpus=gpus,
            software=describe_software(),
            is_cuda_build=tf.test.is_built_with_cuda(),
        )
        kind = settings["kind"]
        if kind == "auto":
            kind = "GPU" if gpus else "CPU"
        if kind == "GPU" and not gpus:
            return
        names, cpus = trial_lib.configure(kind, settings["memory_limit"])
        devices = trial_lib.Devices(
            names,
            cpus,
            settings["quick"],
            settings["size"],
            {**settings, "num_gpus": len(gpus)},
        )
        for name in settings["checks"]:
            write(check=name, status="running")

            def report(outcome: dict[str, Any], name: str = name) -> None:
                write(check=name, **outcome)

            passed = run_check(CHECKS[name], devices, report)
            write(check=name, status="done")
            if not passed:
                # The process ends, because its collectives may fail from now
                # on. The other checks resume in a new process.
                break
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    main(sys.argv)
