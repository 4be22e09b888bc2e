"""The lines that users are told by an optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.codecs import wire_report
from tf_regtopk.distribute import topology
from tf_regtopk.optimizers import notices


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
    assert "There is a single replica: no entry is sent" in warning
    assert len(told(capfd, tf_regtopk.Dense())) == 1


def test_a_single_worker(capfd, mirrored):
    with mirrored(2).scope():
        line, warning = told(capfd, hierarchical=True)
        [dense] = told(capfd, hierarchical=True, exchange="dense")
    assert line.endswith("1,000 of 20,000 entries, by a single worker.")
    assert "There is a single worker: no entry is sent" in warning
    assert dense.endswith("all-reduce of 2 replicas.")


def test_the_report_of_workers(capfd):
    """Of two workers with two replicas each, whose scope there is not."""
    cluster = tf_regtopk.Cluster(num_replicas=4, num_workers=2)
    participants = topology.Participants(tf_regtopk.Hierarchical(), cluster)
    variable = keras.Variable(np.zeros(20_000, "float32"))
    codec = tf_regtopk.Codec().payload(k=1000, size=20_000)
    report = wire_report.report(codec, [variable], [], participants)
    assert "by each of 2 workers" in str(report)
    assert "sent by a worker" in str(report)
    capfd.readouterr()
    notices.tell_what_is_sent(report, "TopK", 0.05)
    assert "Hierarchical of 2 workers." in capfd.readouterr().err
    dense = wire_report.report(None, [], [variable], participants)
    assert "summed over 4 replicas" in str(dense)


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
