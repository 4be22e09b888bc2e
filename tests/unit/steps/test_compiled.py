"""What runs on one replica is compiled by XLA."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.steps import dense_step
from tf_regtopk.steps import sparse_step


@pytest.mark.parametrize(
    "exchange, step, names",
    [
        ("sparse", sparse_step.SparseStep, ("send", "decode", "settle")),
        ("dense", dense_step.DenseStep, ("_accumulate", "_apply")),
    ],
)
def test_a_step_is_compiled(exchange, step, names, monkeypatch):
    programs = {}

    def record(name, function):
        def call(self, *args):
            bound = function.__get__(self, step)
            # An error where a function is not for XLA.
            ir = bound.function.experimental_get_compiler_ir(*args)
            programs[name] = ir(stage="hlo")
            return bound(*args)

        monkeypatch.setattr(step, name, call)

    for name in names:
        record(name, vars(step)[name])
    variable = keras.Variable(np.zeros(6), dtype="float32")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0),
        tf_regtopk.TopK(0.5),
        error_feedback=tf_regtopk.Accumulate(momentum=0.9),
        exchange=exchange,
    )
    optimizer.apply([tf.range(6.0)], [variable])
    assert all("HloModule" in programs[name] for name in names)
