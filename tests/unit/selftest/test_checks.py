"""The self-test: each of its checks passes, and fails on a planted fault.

The checks run here as Python does them, operation by operation, which takes
less time than to compile. The command at the end compiles."""

import contextlib
import dataclasses
import os
import re
import sys
import threading

import keras
import numpy as np
import paths
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk.codecs import payload as payload_lib
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import replica_state
from tf_regtopk.error_feedback import ef21
from tf_regtopk.error_feedback import equations
from tf_regtopk.kernels import hashing
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.optimizers import sparsified
from tf_regtopk.optimizers import wrapper
from tf_regtopk.selftest import checks
from tf_regtopk.selftest import trial
from tf_regtopk.selftest import workers
from tf_regtopk.selftest.checks import parts
from tf_regtopk.steps import finiteness
from tf_regtopk.steps import local_accumulation
from tf_regtopk.steps import scattered_step

CPUS = ("CPU:0", "CPU:1")


@pytest.fixture(autouse=True)
def _eager():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def devices(mirrored):
    class Devices(trial.Devices):
        # One strategy with collectives for a pair of devices in a process.
        all = property(lambda self: mirrored(2))

    replicas = mirrored(2).extended.worker_devices
    names = tuple(map(trial.device_name, replicas))
    return Devices(names, CPUS, size=3_011, settings={"worker_seconds": 60})


def failures(check, devices, cases):
    """What the cases of a check whose names hold `cases` find wrong."""
    ended = {}

    def some(devices):
        return (
            (name, function)
            for name, function in checks.CHECKS[check](devices)
            if cases in name
        )

    def report(outcome):
        ended[outcome["case"]] = outcome

    passed = checks.run_check(some, devices, report)
    assert ended, f"{check} has no case like {cases}"
    failed = {
        name: outcome["found"]
        for name, outcome in ended.items()
        if outcome["status"] != "ok"
    }
    assert passed == (not failed)
    return failed


def xla_ignores_the_device(monkeypatch):
    monkeypatch.setattr(tf, "device", lambda device: contextlib.nullcontext())


def error_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        equations,
        "residual_error",
        lambda a, indices, sent: tf.zeros_like(a),
    )


def replica_hears_itself_only(monkeypatch):
    monkeypatch.setattr(
        collectives,
        "all_gather",
        lambda payload, num_used=None: tf.tile(payload[tf.newaxis], [2, 1]),
    )


def receivers_double_ternary(monkeypatch):
    decode = codecs.PayloadCodec.decode

    def decode_double(self, payloads):
        indices, values, is_valid = decode(self, payloads)
        is_ternary = getattr(self.values, "bucket_size", 0) is None
        return indices, values * (2.0 if is_ternary else 1.0), is_valid

    monkeypatch.setattr(codecs.PayloadCodec, "decode", decode_double)


def shift_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        ef21.EF21, "update", lambda self, local, *args: tuple(local)
    )


def density_stays(monkeypatch):
    monkeypatch.setattr(
        sparsified.SparsifiedOptimizer,
        "set_density",
        lambda self, density: None,
    )


def batches_are_forgotten(monkeypatch):
    """The last one alone counts."""
    monkeypatch.setattr(
        local_accumulation.LocalAccumulation,
        "_mean",
        lambda self, gradients: list(gradients),
    )


def replicas_keep_their_words(monkeypatch):
    monkeypatch.setattr(collectives, "all_to_all", lambda payloads: payloads)


def a_word_is_lost_on_the_way(monkeypatch):
    exchange = collectives.all_to_all

    def exchange_some(payloads):
        received = exchange(payloads)
        return tf.concat([received[:, :-1], received[:, :1]], axis=1)

    monkeypatch.setattr(collectives, "all_to_all", exchange_some)


def what_finds_no_room_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        scattered_step.ScatteredStep, "_taken_over", lambda self, reduced: None
    )


def state_is_on_the_first_device(monkeypatch):
    create = replica_state.ReplicaState.__init__

    def create_once(self, initial, participants=None):
        create(self, initial, participants)

        def make():
            with tf.device("CPU:0"):
                self._variables = tf.nest.map_structure(
                    tf.Variable, self._initial()
                )

        # A thread of its own has no strategy.
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()

    monkeypatch.setattr(replica_state.ReplicaState, "__init__", create_once)


def sum_is_rounded(monkeypatch):
    """Only with collectives, so not on the CPUs that are compared with."""
    add = scatter_sum.sum_entries

    def add_and_round(*args):
        strategy = tf.distribute.get_strategy()
        ops = strategy.extended._cross_device_ops
        total = add(*args)
        if isinstance(ops, tf.distribute.ReductionToOneDevice):
            return total
        return total * (1 + 2**-20)

    monkeypatch.setattr(scatter_sum, "sum_entries", add_and_round)


def rounding_is_random(monkeypatch):
    monkeypatch.setattr(
        hashing,
        "uniform",
        lambda size, *args, **kwargs: tf.random.uniform([size]),
    )


def no_check_for_nan(monkeypatch):
    monkeypatch.setattr(
        finiteness, "is_sum_finite", lambda m: tf.constant(True)
    )
    monkeypatch.setattr(finiteness, "are_finite", lambda t: tf.constant(True))


def overflow_is_not_told(monkeypatch):
    apply = wrapper.OptimizerWrapper.apply_if_finite

    def apply_and_keep_silent(self, *args):
        apply(self, *args)
        return tf.constant(True)

    monkeypatch.setattr(
        wrapper.OptimizerWrapper, "apply_if_finite", apply_and_keep_silent
    )


def loading_loses_the_error(monkeypatch):
    load = sparsified.SparsifiedOptimizer.load_state

    def load_some(self, saved):
        load(self, saved)
        state, _ = trial.states_of(self)
        state.assign_local(
            [[np.zeros_like(a) for a in r] for r in state.local_arrays()]
        )

    monkeypatch.setattr(sparsified.SparsifiedOptimizer, "load_state", load_some)


def steps_are_not_taken(monkeypatch):
    monkeypatch.setattr(
        wrapper.OptimizerWrapper, "apply", lambda self, *args: None
    )


def fail_when_run(monkeypatch, layer_class, error):
    """A layer fails as without its library: shapes are known, and no more."""
    call = layer_class.call

    def call_and_fail(self, inputs):
        if hasattr(inputs, "numpy"):
            raise error
        return call(self, inputs)

    monkeypatch.setattr(layer_class, "call", call_and_fail)


def no_cublas(monkeypatch):
    message = "Graph execution error:\n\nNo BLAS support for stream"
    error = tf.errors.InternalError(None, None, message)
    fail_when_run(monkeypatch, keras.layers.Dense, error)


def no_cudnn(monkeypatch):
    message = "DNN library is not found."
    error = tf.errors.UnimplementedError(None, None, message)
    fail_when_run(monkeypatch, keras.layers.Conv2D, error)


# A check, the cases to run of it, a fault, and what is found.
FAULTS = [
    (
        "environment",
        "XLA",
        xla_ignores_the_device,
        r"a compiled function ran on .PU:0",
    ),
    (
        "one_device",
        "float32",
        error_is_forgotten,
        "what was applied and what is held back differ",
    ),
    (
        "sparsifiers",
        "TopK",
        replica_hears_itself_only,
        "weights of replica 1 after step 1 differ from those of replica 0",
    ),
    ("codecs", "ternary", receivers_double_ternary, "what was applied"),
    (
        "error_feedback",
        "EF21",
        shift_is_forgotten,
        "the shifts of all replicas",
    ),
    (
        "options",
        "set_density",
        density_stays,
        r"weights, where \d+ must be sent",
    ),
    (
        "options",
        "accumulation_steps",
        batches_are_forgotten,
        "what was applied and what is held back differ",
    ),
    (
        "reduce_scatter",
        "known words",
        replicas_keep_their_words,
        "words that replica 0 has received differ from those sent to 0",
    ),
    (
        "reduce_scatter",
        "known words",
        a_word_is_lost_on_the_way,
        "words that replica . has received differ .* in 2 of 2000",
    ),
    (
        "reduce_scatter",
        "TopK",
        what_finds_no_room_is_forgotten,
        "what was applied and what is held back differ",
    ),
    (
        "placement",
        "EF21",
        state_is_on_the_first_device,
        r"lies on \['CPU:0'\]",
    ),
    (
        "same_as_cpu",
        "TopK",
        sum_is_rounded,
        "weights after step 1 differ from those on CPUs",
    ),
    ("repeatable", "", rounding_is_random, "of the second run differ"),
    (
        "non_finite",
        "infinity",
        no_check_for_nan,
        r"\(iterations, skipped_steps\) must be \(1, 1\)",
    ),
    ("loss_scale", "", overflow_is_not_told, "the scale must be 16384"),
    (
        "saving",
        "all devices",
        loading_loses_the_error,
        r"weights \d steps after loading differ",
    ),
    ("fit", "all devices", steps_are_not_taken, "the loss does not fall"),
    # Keras says in which layer.
    (
        "fit_dense",
        "",
        no_cublas,
        "^InternalError: .*No BLAS support for stream$",
    ),
    (
        "fit_conv",
        "",
        no_cudnn,
        r"^UnimplementedError: .*library is not found\.$",
    ),
    ("speed", "sparse, 2", steps_are_not_taken, "0 of 10 steps were taken"),
]


@pytest.mark.slow
@pytest.mark.parametrize("check, cases, fault, message", FAULTS)
def test_check_fails_on_a_fault(check, cases, fault, message, devices):
    if check == "speed":
        devices = dataclasses.replace(devices, quick=True)
    # Those of the quick run, and the two below, are seen to pass there.
    if check not in (*checks.QUICK, "fit_dense", "fit_conv"):
        assert failures(check, devices, cases) == {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault(monkeypatch)
        found = failures(check, devices, cases)
    assert found
    for text in found.values():
        assert re.search(message, text), text
        assert "\n" not in text


@pytest.mark.parametrize(
    "error, expected",
    [
        (trial.CheckError("one is 2"), "one is 2"),
        (ValueError(), "ValueError:"),
        (
            tf.errors.InvalidArgumentError(
                None,
                None,
                "Graph execution error:\n\nDetected at node add defined at "
                '(most recent call last):\n  File "a.py", line 1\n\n'
                "2 root error(s) found.\n  (0) INVALID_ARGUMENT: must match\n"
                "\t [[{{node add}}]]\n  (1) INVALID_ARGUMENT: must too\n",
            ),
            "InvalidArgumentError: 2 root error(s) found. (0) "
            "INVALID_ARGUMENT: must match (1) INVALID_ARGUMENT: must too",
        ),
        (
            ValueError(
                "\x1b[1mIn Dense.call().\x1b[0m\n\n\x1b[1mNo BLAS\x1b[0m\n\n"
                "Arguments received by Dense.call():\n  • x=1"
            ),
            "ValueError: In Dense.call(). No BLAS",
        ),
    ],
)
def test_errors_are_told_in_a_line(error, expected):
    assert checks.summary_of(error) == expected


def test_every_check_has_a_fault():
    planted = {check for check, *_ in FAULTS}
    assert planted | checks.OF_WORKERS == set(checks.CHECKS)


@pytest.mark.parametrize(
    "fault, passing",
    [
        (no_cublas, "fit_conv"),
        pytest.param(no_cudnn, "fit_dense", marks=pytest.mark.slow),
    ],
)
def test_a_missing_library_fails_only_what_needs_it(
    fault, passing, devices, monkeypatch
):
    fault(monkeypatch)
    assert failures(passing, devices, "all devices") == {}


def test_the_cases_cover_all_parts(devices):
    """What the lists of the checks leave to other checks is in those."""
    values = {values for _, values in parts.CODECS} | {"float32"}
    assert values == set(payload_lib.value_codecs.CODECS)
    indices = {indices for indices, _ in parts.CODECS} | {"auto"}
    assert indices == {"auto", *payload_lib.index_codecs.CODECS}

    def classes(base):
        found = {base}
        for each in list(found):
            found |= {c for d in each.__subclasses__() for c in classes(d)}
        return {c for c in found if c.__name__ in tf_regtopk.__all__}

    rules = {type(rule) for rule in parts.RULES.values()}
    rules |= {tf_regtopk.Accumulate}
    assert rules == classes(error_feedback.ErrorFeedback) - {
        error_feedback.ErrorFeedback
    }
    base = tf_regtopk.Sparsifier
    sparsifiers = {type(s) for s in parts.SPARSIFIERS.values()}
    assert sparsifiers == classes(base) - {base}
    for check in checks.CHECKS.values():
        names = [name for name, _ in check(devices)]
        assert names and len(set(names)) == len(names)


# Plays a worker: its settings, and what it is to do.
FAKE_WORKER = """
import json, sys, time
import numpy as np
settings = json.loads(sys.argv[1])
number = settings["number"]
for step in range(4):
    print("step", step, flush=True)
"""


def play(monkeypatch, text):
    command = (sys.executable, "-c", FAKE_WORKER + text)
    monkeypatch.setattr(workers, "COMMAND", command)


def test_two_workers_agree(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    settings = {"worker_seconds": 600}
    devices = trial.Devices(CPUS, CPUS, True, settings=settings)
    assert failures("workers", devices, "AUTO") == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("time.sleep(100 * number)", "worker 1 has not ended after"),
        (
            "sys.exit(number and 'no way')",
            "worker 1 ended with status 1: .*no way",
        ),
        (
            "w = np.zeros([4, 9]); w[2] += number\n"
            "np.savez(settings['output'], weights0=w, held_back0=w[:1])",
            "RegTopK: weights of worker 1 after step 2 differ",
        ),
        (
            "w = np.zeros([4, 3090])\n"
            "np.savez(settings['output'], weights0=w, held_back0=w[:1])",
            "what was applied and what is held back differ",
        ),
    ],
)
def test_workers_fails_on_a_fault(text, message, devices, monkeypatch):
    play(monkeypatch, text)
    devices.settings["worker_seconds"] = 2 if "sleep" in text else 60
    [found] = failures("workers", devices, "AUTO").values()
    assert re.search(message, found)


def test_nccl_is_for_two_gpus():
    devices = trial.Devices(("GPU:0", "GPU:1"), CPUS, settings={"num_gpus": 1})
    [_, (name, function)] = checks.CHECKS["workers"](devices)
    assert name == "NCCL"
    with pytest.raises(trial.SkippedError, match="here are 1"):
        function()


@pytest.mark.parametrize(
    "visible, shares", [(None, ["0,1", "2,3"]), ("7,5,3", ["7", "5"])]
)
def test_workers_share_the_gpus(visible, shares, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    num_gpus = 4
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        num_gpus = 3
    devices = trial.Devices(
        ("GPU:0", "GPU:1"), CPUS, settings={"num_gpus": num_gpus}
    )
    assert [workers.visible_gpus(number, devices) for number in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": share} for share in shares
    ]


# The first one waits, for as long as it is said, and ends as it is said.
@pytest.mark.parametrize(
    "text, message",
    [
        ("time.sleep(100) if number else (time.sleep(0.3), sys.exit(3))", None),
        (
            "time.sleep(100) if number else (time.sleep(0.3), sys.exit(0))",
            "the worker left alone must end by an error of a collective, and "
            "ended with status 0",
        ),
        ("time.sleep(100)", "has not ended after 3 s"),
        ("sys.exit(1)", "the workers do not get to the third step"),
    ],
)
def test_lost_worker(text, message, devices, monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 1.0)
    if message and "third" in message:
        monkeypatch.setattr(
            sys.modules[__name__], "FAKE_WORKER", "import sys\n"
        )
    play(monkeypatch, text)
    found = failures("lost_worker", devices, "")
    assert bool(found) == bool(message)
    for text in found.values():
        assert message in text
