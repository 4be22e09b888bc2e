"""The lines that users are told by an optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk


def told(capfd, sparsifier=None, num_entries=20_000, **arguments):
    """The lines of a build, with the level of each."""
    capfd.readouterr()
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), sparsifier, **arguments
    )
    optimizer.build([keras.Variable(np.zeros(num_entries, "float32"))])
    lines = capfd.readouterr().err.splitlines()
    return [line for line in lines if ":tf_regtopk:" in line]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            dict(),
            "RegTopK 5 %: 1,000 of 20,000 entries, 4.79 kB a step instead of "
            "80 kB, AllGather of 2 replicas.",
        ),
        (
            # As if it reached the entropy, which no random entries have to be
            # encoded for.
            dict(
                num_entries=2_000_000,
                sparsifier=tf_regtopk.TopK(),
                codec=tf_regtopk.Codec("golomb"),
            ),
            "TopK 0.1 %: 2,000 of 2M entries, 10.9 kB a step instead of 8 MB, "
            "AllGather of 2 replicas.",
        ),
        (
            dict(exchange="dense"),
            "Dense exchange: 80 kB a step, all-reduce of 2 replicas.",
        ),
    ],
)
def test_a_line_says_what_is_sent(capfd, mirrored, arguments, expected):
    with mirrored(2).scope():
        assert told(capfd, **arguments) == [f"INFO:tf_regtopk: {expected}"]


def test_few_entries(capfd, mirrored):
    with mirrored(2).scope():
        _, line = told(capfd, tf_regtopk.TopK(0.001))
    assert line.startswith("WARNING:tf_regtopk: Only 20 entries are sent")


def test_more_bytes_than_without(capfd, mirrored):
    with mirrored(3).scope():
        _, line = told(capfd, tf_regtopk.TopK(0.75))
    assert line.startswith(
        "WARNING:tf_regtopk: A replica sends 125 kB a step, and 107 kB without"
    )


def test_a_single_replica(capfd):
    line, warning = told(capfd)
    assert line.endswith("1,000 of 20,000 entries, by a single replica.")
    assert "There is a single replica: nothing is sent" in warning
    assert len(told(capfd, tf_regtopk.Dense())) == 1


def test_the_first_skipped_step_is_told_once(capfd, mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(np.zeros(3, "float32"))
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), tf_regtopk.Dense()
        )
        optimizer.build([variable])

    @tf.function
    def step(values):
        strategy.run(lambda: optimizer.apply([values], [variable]))

    capfd.readouterr()
    step(tf.ones([3]))
    assert "skipped" not in capfd.readouterr().err
    for _ in range(2):
        step(tf.fill([3], np.nan))
    assert optimizer.skipped_steps == 2
    assert capfd.readouterr().err.count("A step is skipped on all rep") == 1


def test_steps_skipped_by_a_loss_scale_are_not_told(capfd):
    variable = keras.Variable(np.zeros(3, "float32"))
    optimizer = tf_regtopk.LossScaleOptimizer(
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())
    )
    optimizer.apply([tf.fill([3], np.nan)], [variable])
    assert optimizer.inner_optimizer.skipped_steps == 1
    assert "A step is skipped" not in capfd.readouterr().err
