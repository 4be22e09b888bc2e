"""Variables of replicas that have values of their own."""

import json

import keras
import numpy as np
import pytest

from tf_regtopk.saving import replica_variables
from tf_regtopk.saving import saved_state


def make(strategy):
    """A variable of floats, one of 16 bits and one of integers."""
    with strategy.scope():
        return [
            keras.Variable(np.zeros(2), dtype="float32"),
            keras.Variable(np.zeros(3), dtype="bfloat16"),
            keras.Variable(0, dtype="int64", trainable=False),
        ]


def values_of(rank):
    return [np.arange(2.0) + rank, np.arange(3.0) + 2 * rank, 7 + rank]


def saved_by(strategy):
    """What replicas with other values each have saved, as a file gives it."""
    variables = make(strategy)
    for variable, values in zip(
        variables, zip(*map(values_of, range(3)), strict=True), strict=True
    ):
        parts = strategy.experimental_local_results(variable.value)
        for part, value in zip(parts, values, strict=False):
            part.assign(value)
    read = replica_variables.read(variables, strategy)
    saved = saved_state.SavedState(
        {"variables": replica_variables.describe(variables)},
        {},
        len(read),
        dict(enumerate(read)),
    )
    return saved_state.from_bytes(saved_state.to_bytes(saved))[0]


def test_each_replica_gets_its_own(mirrored):
    strategy = mirrored(3)
    saved, variables = saved_by(strategy), make(strategy)
    values = replica_variables.values_for(saved, range(3), 3, variables)
    replica_variables.assign(variables, strategy, values)
    for i, variable in enumerate(variables):
        parts = strategy.experimental_local_results(variable.value)
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(
                part.numpy().astype("float32"), values_of(rank)[i]
            )


@pytest.mark.parametrize("n", [0, 2])
def test_others_get_the_mean(n, mirrored):
    saved, variables = saved_by(mirrored(3)), make(mirrored(n))
    count = max(1, n)
    values = replica_variables.values_for(saved, range(count), count, variables)
    replica_variables.assign(variables, mirrored(n), values)
    for variable, expected in zip(
        variables, [[1, 2], [2, 3, 4], 7], strict=True
    ):
        for part in mirrored(n).experimental_local_results(variable.value):
            np.testing.assert_array_equal(
                part.numpy().astype("float32"), expected
            )


def test_replicas_that_are_missing(mirrored):
    saved, variables = saved_by(mirrored(3)), make(mirrored(0))
    del saved.replicas[1]
    # Of the same number a worker needs its own alone.
    replica_variables.values_for(saved, [2], 3, variables)
    for replicas, num_replicas in (([1], 3), ([0], 1)):
        with pytest.raises(ValueError, match="none of the replicas \\[1\\]"):
            replica_variables.values_for(
                saved, replicas, num_replicas, variables
            )


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays[:-1],
        lambda arrays: [arrays[0][:1], *arrays[1:]],
        lambda arrays: [arrays[0].astype("float64"), *arrays[1:]],
    ],
)
def test_arrays_that_do_not_fit(change, mirrored):
    saved, variables = saved_by(mirrored(3)), make(mirrored(3))
    saved.replicas[1] = change(saved.replicas[1])
    for num_replicas in (3, 2):
        with pytest.raises(ValueError, match="of the shapes and dtypes"):
            replica_variables.values_for(saved, [0, 1], num_replicas, variables)


def test_a_description_passes_through_json(mirrored):
    described = replica_variables.describe(make(mirrored(0)))
    assert described == [[[2], "float32"], [[3], "bfloat16"], [[], "int64"]]
    assert json.loads(json.dumps(described)) == described
