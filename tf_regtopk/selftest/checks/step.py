"""Checks of one step, in all its forms."""

from collections.abc import Iterator
import functools
import math

import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import Trial


def one_device(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks all parts on the first device, without and with a strategy."""
    forms = {
        "RegTopK, float32, Accumulate": {},
        "TopK, bfloat16, factor masking, per variable": dict(
            sparsifier=parts.SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="bfloat16"),
            error_feedback=parts.RULES["Accumulate(momentum, factor_masking)"],
            scope="per_variable",
        ),
        "RandomK, float16, NoFeedback, dense_below": dict(
            sparsifier=parts.SPARSIFIERS["RandomK"],
            codec=tf_regtopk.Codec(values="float16"),
            error_feedback=parts.RULES["NoFeedback"],
            **parts.SOME_DENSE,
        ),
        "Dense, natural, EF21": dict(
            sparsifier=parts.SPARSIFIERS["Dense"],
            codec=tf_regtopk.Codec(values="natural"),
            error_feedback=parts.RULES["EF21"],
        ),
        'RegTopK(denominator="current"), uniform, EF21(momentum)': dict(
            sparsifier=parts.SPARSIFIERS['RegTopK(denominator="current")'],
            codec=tf_regtopk.Codec(values="uniform"),
            error_feedback=parts.RULES["EF21(momentum)"],
        ),
        "TopK, sign, LearnedShift": dict(
            sparsifier=parts.SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="sign"),
            error_feedback=parts.RULES["LearnedShift"],
        ),
        "RegTopK, sign, LearnedShift(at_once)": dict(
            codec=tf_regtopk.Codec(values="sign"),
            error_feedback=parts.RULES["LearnedShift(at_once)"],
        ),
        "RegTopK, sign, LocalAdam": dict(
            codec=tf_regtopk.Codec(values="sign"),
            error_feedback=parts.RULES["LocalAdam"],
        ),
        "RegTopK, ternary, LearnedShift(momentum)": dict(
            codec=tf_regtopk.Codec(values="ternary"),
            error_feedback=parts.RULES["LearnedShift(momentum)"],
        ),
        "TopK, ternary, CompressedDownlink": dict(
            sparsifier=parts.SPARSIFIERS["TopK"],
            codec=tf_regtopk.Codec(values="ternary"),
            error_feedback=parts.RULES["CompressedDownlink"],
        ),
    }
    places = (
        ("without a strategy", devices.plain),
        ("OneDeviceStrategy", devices.one),
    )
    for number, (name, form) in enumerate(forms.items()):
        form.setdefault("sparsifier", parts.SPARSIFIERS["RegTopK"])
        # The forms take turns, because each in both places would take long;
        # only the default runs in both.
        for how, strategy in (
            places if number == 0 else places[number % 2 :][:1]
        ):
            if not devices.quick or number == 2:
                yield (
                    f"{name}, {how}",
                    functools.partial(parts.run_case, strategy, **form),
                )
    for how, strategy in places:
        if not devices.quick:
            yield (
                f"set_density, {how}",
                functools.partial(change_density, strategy),
            )


def sparsifiers(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks each sparsifier on all devices."""
    for name, sparsifier in parts.SPARSIFIERS.items():
        if not devices.quick or name == "RegTopK":
            yield (
                name,
                functools.partial(
                    parts.run_case, devices.all, sparsifier=sparsifier
                ),
            )


def codecs(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks each index codec and each value codec on all devices."""
    for number, (indices, values) in enumerate(parts.CODECS):
        if not devices.quick or number == 3:
            yield (
                f'Codec("{indices}", "{values}")',
                functools.partial(
                    parts.run_case,
                    devices.all,
                    sparsifier=parts.SPARSIFIERS["TopK"],
                    codec=tf_regtopk.Codec(indices, values),
                ),
            )


def error_feedback(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks each rule of error feedback on all devices."""
    for name, rule in parts.RULES.items():
        if not devices.quick or name == "LearnedShift":
            yield (
                name,
                functools.partial(
                    parts.run_case,
                    devices.all,
                    sparsifier=parts.SPARSIFIERS["TopK"],
                    error_feedback=rule,
                ),
            )


def options(devices: trial_lib.Devices) -> Iterator[parts.Case]:
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
    trial = Trial(strategy, parts.SPARSIFIERS["TopK"], scope="per_variable")
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
    trial = Trial(strategy, parts.SPARSIFIERS["RegTopK"], **parts.SOME_DENSE)
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
    trial = Trial(strategy, parts.SPARSIFIERS["RegTopK"], exchange="dense")
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
        strategy, parts.SPARSIFIERS["RegTopK"], accumulation_steps=2
    )
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)


def change_density(strategy: tf.distribute.Strategy) -> None:
    """Checks that `set_density` sends more, and that nothing is lost."""
    trial = Trial(strategy, parts.SPARSIFIERS["RegTopK"])
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
