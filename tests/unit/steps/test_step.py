"""The names that the parts of a step have in a trace."""

import re

import keras
import numpy as np
import played_gpus
import pytest
import tensorflow as tf

import tf_regtopk

SPARSE = {"join", "send", "exchange", "decode", "check", "settle", "split"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(), SPARSE),
        (dict(dense_below=3), {*SPARSE, "all_reduce"}),
        (dict(exchange="dense"), {"all_reduce", "check"}),
    ],
)
def test_operations_have_the_names_of_the_parts(mirrored, arguments, expected):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable(np.zeros(n, "float32")) for n in (9, 2)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.TopK(0.5), **arguments
        )
        optimizer.build(variables)

    @tf.function
    def step():
        strategy.run(
            lambda: optimizer.apply([tf.ones([9]), tf.ones([2])], variables)
        )

    graph = step.get_concrete_function().graph
    names = [op.name for op in played_gpus.operations(graph)]
    found = [re.search(r"\btf_regtopk/(\w+?)(_\d+)?/", name) for name in names]
    assert {match.group(1) for match in found if match} == expected
    for part in expected & {"send", "decode", "settle"}:
        calls = [
            name
            for name in played_gpus.compiled_calls(graph)
            if f"tf_regtopk/{part}" in name
        ]
        assert len(calls) == 2  # One a replica.
