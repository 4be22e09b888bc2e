"""The wire report, against what is sent."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import wire_models

import tf_regtopk


@pytest.mark.parametrize(
    "name, dense_below",
    [("default", 0), ("golomb, ternary", 10), ("raw", 0)],
)
def test_report_is_what_is_sent(name, dense_below, mirrored, monkeypatch):
    optimizer, variables = wire_models.make(
        mirrored(3),
        sparsifier=tf_regtopk.TopK(0.1),
        codec=wire_models.CODECS[name],
        dense_below=dense_below,
    )
    report = optimizer.wire_report()
    num_entries = wire_models.SIZE - (7 if dense_below else 0)
    assert report.num_entries == num_entries
    assert report.num_selected == round(0.1 * num_entries)
    assert report.num_replicas == 3
    assert report.dense_bytes == 4 * wire_models.SIZE
    assert report.dense_below_bytes == (28 if dense_below else 0)
    sizes = []
    original = tf.distribute.ReplicaContext.all_gather

    def record(self, value, axis, options=None):
        sizes.append(tf.size(value) * value.dtype.size)
        return original(self, value, axis, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_gather", record)

    def run(g):
        sizes.clear()
        parts = tf.split(g, wire_models.SIZES)
        optimizer.apply(
            [
                tf.reshape(p, s)
                for p, s in zip(parts, wire_models.SHAPES, strict=True)
            ],
            variables,
        )
        return sizes[-1]

    sent = mirrored(3).run(
        run, args=(tf.random.stateless_normal([wire_models.SIZE], [0, 0]),)
    )
    for number in mirrored(3).experimental_local_results(sent):
        if "golomb" in name:  # By the indices at hand.
            assert abs(int(number) - report.payload_bytes) <= 8
        else:
            assert int(number) == report.payload_bytes


def test_report_of_a_large_model():
    size = 1_000_000
    variable = keras.Variable(np.zeros(size), dtype="float32")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(),
        tf_regtopk.RegTopK(0.01),
        codec=tf_regtopk.Codec(values="natural"),
    )
    with pytest.raises(
        ValueError, match="The optimizer must be built before `wire_report`"
    ):
        optimizer.wire_report()
    optimizer.build([variable])
    report = optimizer.wire_report()
    assert report.bits_per_index == pytest.approx(8.58, abs=0.03)
    assert report.entropy_bits_per_index == pytest.approx(8.08, abs=0.01)
    assert report.bits_per_value == pytest.approx(8.0, abs=0.01)
    assert report.payload_bytes == pytest.approx(20725, abs=20)
    assert report.ratio == pytest.approx(193, abs=1)
    assert report.sent_bytes == report.dense_sent_bytes == 0  # One replica.
    for text in ("10,000 of 1,000,000", "8.56 (EliasFano; at least 8.08)"):
        assert text in str(report)
    assert optimizer.iterations.numpy() == 0


def test_report_where_all_is_dense():
    optimizer, _ = wire_models.make(
        tf.distribute.get_strategy(), dense_below=1000
    )
    report = optimizer.wire_report()
    assert report.payload_bytes == 0
    assert (
        report.dense_below_bytes == report.dense_bytes == 4 * wire_models.SIZE
    )
    assert report.ratio == 1.0
    assert "dense, because no variable is sent sparsely" in str(report)


def test_text_of_a_dense_exchange(mirrored):
    """Of nothing that it does not do: no indices, no payloads."""
    optimizer, _ = wire_models.make(mirrored(2), exchange="dense")
    assert str(optimizer.wire_report()).splitlines() == [
        "exchange           dense",
        "all gradients      424 bytes, summed over 2 replicas",
        "sent by a replica  424 bytes a step (ring all-reduce)",
    ]
