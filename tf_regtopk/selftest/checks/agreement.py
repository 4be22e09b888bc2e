"""Checks that replicas agree, with each other and with CPUs."""

from collections.abc import Iterator
import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import Trial


def placement(devices: trial_lib.Devices) -> Iterator[parts.Case]:
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
        trial = Trial(strategy, parts.SPARSIFIERS["RegTopK"], **kwargs)
        for when in ("built", "set_density"):
            for dtype, places in trial_lib.state_devices(trial):
                if tuple(places) != tuple(names):
                    raise CheckError(
                        f"a {dtype} variable of the replicas on {names} lies "
                        f"on {places} ({when})"
                    )
            trial.optimizer.set_density(0.25)


def same_as_cpu(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that all devices compute the same results as CPUs."""
    forms: dict[str, tuple[parts.Expect, dict[str, Any]]] = {
        "TopK, to the bit": (
            trial_lib.expect_same,
            {"sparsifier": parts.SPARSIFIERS["TopK"]},
        ),
        "RandomK by variable, golomb, bfloat16, to the bit": (
            trial_lib.expect_same,
            {
                "sparsifier": parts.SPARSIFIERS["RandomK"],
                "scope": "per_variable",
                "codec": tf_regtopk.Codec("golomb", "bfloat16"),
            },
        ),
        f"RegTopK, within {trial_lib.TOLERANCE:g}": (
            trial_lib.expect_close,
            {"sparsifier": parts.SPARSIFIERS["RegTopK"]},
        ),
        f"RegTopK, LearnedShift(momentum), within {trial_lib.TOLERANCE:g}": (
            trial_lib.expect_close,
            {
                "sparsifier": parts.SPARSIFIERS["RegTopK"],
                "error_feedback": parts.RULES["LearnedShift(momentum)"],
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
    expect: parts.Expect,
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


def repeatable(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that two runs agree to the bit."""
    form = {
        # The value codec rounds stochastically, which must be repeatable too.
        "codec": tf_regtopk.Codec(values="natural"),
        "error_feedback": parts.RULES["LearnedShift(momentum)"],
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
            Trial(strategy, parts.SPARSIFIERS["RegTopK"], **kwargs), gradients
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


def non_finite(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that no replica takes a step if one has NaN or infinity."""
    for name, value, sparsifier, form in (
        # RandomK does not select infinity first, so that the optimizer has to
        # look for it in the whole gradient.
        ("infinity, RandomK", math.inf, "RandomK", {}),
        ("NaN, RegTopK, dense_below", math.nan, "RegTopK", parts.SOME_DENSE),
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
    trial = Trial(strategy, parts.SPARSIFIERS[sparsifier], **kwargs)
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
