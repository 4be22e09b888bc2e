"""Topologies: their numbers, and steps by a user's own."""

import dataclasses

import flat_gradients
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk

SHAPES = [(5, 7), (3,)]
SIZE = 38


@keras.saving.register_keras_serializable(package="tests")
@dataclasses.dataclass(frozen=True)
class Twice(tf_regtopk.EntryTopology):
    """An all-gather in which every payload travels twice."""

    times: int = 2

    def exchange(self, payload, num_used, cluster):
        replica = tf.distribute.get_replica_context()
        # Bits are not what floats of them compare by.
        words = tf.bitcast(payload, tf.int32)[tf.newaxis]
        for _ in range(self.times):
            received = replica.all_gather(words, axis=0)
        return tf.bitcast(received, tf.float32)

    def sent_bytes(self, num_bytes, cluster):
        return self.times * (cluster.num_replicas - 1) * num_bytes

    def worker_sent_bytes(self, num_bytes, cluster):
        return 0


def train(strategy, num_steps=4, **kwargs):
    """The weights after some steps, and the optimizer."""
    n = strategy.num_replicas_in_sync
    rng = np.random.default_rng(0)
    g = rng.standard_normal((num_steps, n, SIZE)).astype(np.float32) / n
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float32") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.RegTopK(0.3), **kwargs
        )
    step = flat_gradients.step_function(strategy, optimizer, variables)
    for gradients in g:
        step(gradients)
    return flat_gradients.flat_weights(variables), optimizer


def test_a_topology_of_the_user(mirrored):
    expected, gathered = train(mirrored(2))
    actual, optimizer = train(mirrored(2), topology=Twice())
    np.testing.assert_array_equal(actual, expected)
    report, other = optimizer.wire_report(), gathered.wire_report()
    assert report.sent_bytes == 2 * other.sent_bytes > 0
    assert "bytes a step (Twice)" in str(report)


def test_all_reduce_is_the_dense_exchange(mirrored):
    expected, _ = train(mirrored(2), exchange="dense")
    actual, optimizer = train(mirrored(2), topology=tf_regtopk.AllReduce())
    np.testing.assert_array_equal(actual, expected)
    assert optimizer.chosen_exchange == "dense"
    with pytest.raises(ValueError, match='`exchange` must be "sparse" or'):
        train(mirrored(0), topology=tf_regtopk.AllReduce(), exchange="auto")


def test_hierarchical_is_a_topology():
    for kwargs in (
        {"hierarchical": True},
        {"topology": tf_regtopk.Hierarchical()},
        {"topology": tf_regtopk.Hierarchical(), "hierarchical": True},
    ):
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), **kwargs
        )
        assert optimizer.hierarchical
        assert optimizer.topology == tf_regtopk.Hierarchical()
    owners = tf_regtopk.ReduceScatter(hierarchical=True)
    for kwargs in ({}, {"hierarchical": True}):
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), topology=owners, **kwargs
        )
        assert optimizer.hierarchical
        assert optimizer.topology == owners
    assert not tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), topology=tf_regtopk.ReduceScatter()
    ).hierarchical


def test_config():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), topology=Twice(3), telemetry=True
    )
    config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(config)
    assert loaded.topology == Twice(3)
    assert loaded.get_config() == optimizer.get_config()
    # Version 0.1.0 had the boolean alone.
    for name in ("topology", "telemetry"):
        del config["config"][name]
    config["config"]["hierarchical"] = True
    assert keras.optimizers.deserialize(config).hierarchical


def test_bad_arguments():
    sgd = keras.optimizers.SGD()
    with pytest.raises(TypeError, match="`topology` must be a `Topology`"):
        tf_regtopk.SparsifiedOptimizer(sgd, topology="ring")
    with pytest.raises(ValueError, match="`hierarchical=True` must go without"):
        tf_regtopk.SparsifiedOptimizer(sgd, topology=Twice(), hierarchical=True)
    with pytest.raises(
        ValueError, match=r"write `ReduceScatter\(hierarchical=True\)`"
    ):
        tf_regtopk.SparsifiedOptimizer(
            sgd, topology=tf_regtopk.ReduceScatter(), hierarchical=True
        )
    with pytest.raises(ValueError, match="indices in a fixed length"):
        tf_regtopk.SparsifiedOptimizer(
            sgd, topology=Twice(), codec=tf_regtopk.Codec("golomb")
        )


@pytest.mark.parametrize(
    "topology, replicas, workers, count, sent, by_worker",
    [
        (tf_regtopk.AllGather(), 6, 3, 6, 5, 2 * 4),
        (tf_regtopk.AllGather(), 4, 1, 4, 3, 0),
        (tf_regtopk.Hierarchical(), 6, 3, 3, 2, 2),
        (tf_regtopk.Hierarchical(), 4, 1, 1, 0, 0),
        (tf_regtopk.ReduceScatter(), 8, 4, 8, 7 / 8, 2 * 6 / 8),
        (tf_regtopk.ReduceScatter(hierarchical=True), 8, 4, 4, 0.75, 0.75),
        (tf_regtopk.ReduceScatter(hierarchical=True), 4, 1, 1, 0, 0),
        (tf_regtopk.AllReduce(), 4, 2, 4, 1.5, 1.5),
        (tf_regtopk.AllReduce(), 4, 1, 4, 1.5, 0),
    ],
)
def test_numbers(topology, replicas, workers, count, sent, by_worker):
    """For a payload of 100 bytes, counted by hand."""
    cluster = tf_regtopk.Cluster(replicas, workers)
    assert topology.num_participants(cluster) == count
    assert topology.sent_bytes(100, cluster) == 100 * sent
    assert topology.worker_sent_bytes(100, cluster) == 100 * by_worker
