"""What ends a wait, by a strategy that never meets another worker."""

import time

import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import keras_internals
from tf_regtopk.distribute import watchdog


@pytest.fixture
def aborts(monkeypatch):
    """Messages with which collectives would have been aborted."""
    messages = []
    monkeypatch.setattr(keras_internals, "abort_collectives", messages.append)
    return messages


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counters(dog):
    return int(dog._entered.numpy()), int(dog._left.numpy())


def test_what_ends_is_not_aborted(aborts):
    dog = watchdog.Watchdog(0.3)

    @tf.function
    def in_graph(x):
        return dog.watched(lambda: {"double": (2 * x,)})

    for i in range(3):
        assert in_graph(tf.constant(i))["double"][0].numpy() == 2 * i
        assert dog.watched(lambda i=i: tf.constant(i)).numpy() == i
        time.sleep(0.3)
    assert counters(dog) == (6, 6)
    time.sleep(0.6)
    assert not aborts


def test_what_waits_too_long_is_aborted(aborts):
    dog = watchdog.Watchdog(0.2)

    @tf.function
    def wait():
        def collective():
            return tf.py_function(
                lambda: wait_for(lambda: aborts) or 1.0, [], tf.float32
            )

        return dog.watched(collective)

    wait()
    assert counters(dog) == (1, 1)
    [message] = aborts
    assert "for 0.2 s (`timeout_seconds`)" in message


def test_a_long_step_of_many_collectives_is_not_aborted(aborts):
    """What counts is the time since one of them ended."""
    dog = watchdog.Watchdog(0.5)

    @tf.function
    def wait():
        for _ in range(8):
            dog.watched(
                lambda: tf.py_function(
                    lambda: time.sleep(0.1) or 1.0, [], tf.float32
                )
            )

    for _ in range(2):
        wait()
    assert counters(dog) == (16, 16)
    assert not aborts


def test_without_workers_there_is_none(mirrored):
    with mirrored(2).scope():
        assert watchdog.watched(lambda: 1) == 1
    strategy = tf_regtopk.MultiWorkerMirroredStrategy()
    assert strategy.watchdog is None


@pytest.mark.parametrize("timeout_seconds", [0, -1.0])
def test_bad_timeout(timeout_seconds):
    with pytest.raises(ValueError, match="`timeout_seconds` must be positive"):
        tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=timeout_seconds)
