"""Steps in which replicas exchange, with a period that changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk


def make(strategy, period):
    """An optimizer of learning rate 0, and the function of a step."""
    with strategy.scope():
        variable = keras.Variable(0.0, dtype="float32")
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.0),
            tf_regtopk.Complete(),
            communication_period=period,
        )
        optimizer.build([variable])
    traces = []

    @tf.function(autograph=False)
    def step():
        def of_replica():
            optimizer.apply([tf.zeros([])], [variable])

        traces.append(1)
        strategy.run(of_replica)

    first, second = strategy.experimental_local_results(variable.value)

    def exchanges():
        """Whether the replicas have exchanged in a step."""
        first.assign(0.0)
        second.assign(1.0)
        step()
        assert len(traces) == 1
        return first.numpy() == 0.5

    return optimizer, exchanges


def test_a_period_that_changes(mirrored):
    """The same function then exchanges in other steps."""
    optimizer, exchanges = make(mirrored(2), 3)
    assert [exchanges() for _ in range(5)] == [True, False, False, True, False]
    # Two of three steps are over, which now are the whole period.
    optimizer.communication_period = 2
    assert optimizer.communication_period == 2
    assert [exchanges() for _ in range(4)] == [True, False, True, False]
    optimizer.communication_period = 1
    assert [exchanges() for _ in range(3)] == [True] * 3
    # One of four steps is over.
    optimizer.communication_period = 4
    assert [exchanges() for _ in range(5)] == [*[False] * 3, True, False]
    _, _, num_exchanges = optimizer._schedule.variables
    assert num_exchanges.numpy() == 8


def test_the_report_follows(mirrored):
    optimizer, _ = make(mirrored(2), 1)
    sent = optimizer.wire_report().sent_bytes
    optimizer.communication_period = 4
    assert optimizer.wire_report().sent_bytes == sent / 4


def test_what_is_saved(mirrored):
    """Among the variables, with the argument in the configuration."""
    optimizer, exchanges = make(mirrored(2), 2)
    optimizer.communication_period = 5
    exchanges()
    assert optimizer.get_config()["communication_period"] == 2
    other, other_exchanges = make(mirrored(2), 2)
    for variable, value in zip(
        other.variables, optimizer.variables, strict=True
    ):
        variable.assign(value)
    assert other.communication_period == 5
    expected = [exchanges() for _ in range(6)]
    assert [other_exchanges() for _ in range(6)] == expected
    assert np.flatnonzero(expected).tolist() == [4]
    for counter in other.counters:
        counter.assign(0)
    assert other.communication_period == 2


@pytest.mark.parametrize("saved, argument", [(8, 8), (8, 1), (1, 8)])
@pytest.mark.parametrize("is_set", [False, True])
def test_the_saved_period_counts(saved, argument, is_set, mirrored):
    """Not the argument of the optimizer that loads."""
    optimizer, _ = make(mirrored(2), 4 if is_set else saved)
    if is_set:
        optimizer.communication_period = saved
    other, exchanges = make(mirrored(2), argument)
    other.load_state(optimizer.save_state())
    assert other.communication_period == saved
    expected = [i % saved == 0 for i in range(9)]
    assert [exchanges() for _ in range(9)] == expected


def test_a_period_of_an_optimizer_that_is_not_built():
    optimizer = tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.communication_period = 3
    assert optimizer.get_config()["communication_period"] == 3
    for period, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="`communication_period` must be an"):
            optimizer.communication_period = period
