"""The kind of device that a program is compiled for."""

import types

import keras
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import keras_internals
from tf_regtopk.kernels import device_kind


def test_a_gpu_that_no_replica_uses_does_not_count(monkeypatch, mirrored):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: ["GPU:0"])
    found = []
    compiled = tf.function(lambda: found.append(device_kind.is_gpu()))
    mirrored(2).run(compiled)
    assert found and not any(found)
    assert device_kind.is_gpu()


def test_replicas_on_gpus_are_recognised(monkeypatch):
    devices = tuple(f"/replica:0/task:0/device:GPU:{i}" for i in range(2))
    strategy = types.SimpleNamespace(
        extended=types.SimpleNamespace(worker_devices=devices)
    )
    monkeypatch.setattr(tf.distribute, "has_strategy", lambda: True)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    assert device_kind.is_gpu()


@pytest.mark.parametrize(
    "kind, is_enabled, xla_flags, is_told",
    [
        ("GPU", True, "", True),
        ("GPU", False, "", False),
        ("CPU", True, "", False),
        (
            "GPU",
            True,
            "--xla_gpu_enable_scatter_determinism_expander=true",
            False,
        ),
    ],
)
def test_what_determinism_costs_is_told_when_built(
    kind, is_enabled, xla_flags, is_told, monkeypatch, recwarn
):
    monkeypatch.setattr(
        keras_internals, "is_op_determinism_enabled", lambda: is_enabled
    )
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    with device_kind.compile_for(kind):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD()).build(
            [tf.Variable(tf.zeros([9]))]
        )
    told = [w for w in recwarn if "XLA adds entries" in str(w.message)]
    assert len(told) == is_told
