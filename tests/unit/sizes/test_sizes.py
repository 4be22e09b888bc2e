"""What is counted without TensorFlow is what codecs and topologies do."""

import typing

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

import tf_regtopk
from tf_regtopk import codecs
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs
from tf_regtopk.kernels import ownership
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import devices as devices_lib
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.sizes import indices as index_sizes
from tf_regtopk.sizes import payload as payload_sizes
from tf_regtopk.sizes import values as value_sizes

LENGTHS = ((1, 1), (1, 9), (7, 8), (33, 1000), (1024, 9999), (5000, 5000))


def test_the_same_codes_have_a_name():
    fixed = [
        name
        for name, codec in index_codecs.CODECS.items()
        if not codec.is_variable
    ]
    assert list(index_sizes.CODES) == fixed
    names = typing.get_args(value_sizes.ValueCodecName)
    assert tuple(value_sizes.CODES) == tuple(value_codecs.CODECS) == names


@pytest.mark.parametrize("indices", ["auto", *index_sizes.CODES])
@pytest.mark.parametrize("values", value_sizes.CODES)
def test_payloads_are_as_long_as_counted(indices, values):
    for k, size in LENGTHS:
        codec = codecs.Codec(indices, values).payload(k, size)
        number = payload_sizes.num_words(indices, values, k, size)
        assert codec.num_words == number


@given(
    st.integers(1, 2**31 - 1).flatmap(
        lambda size: st.tuples(st.integers(1, size), st.just(size))
    )
)
@settings(max_examples=200, deadline=None)
def test_auto_is_the_shortest_code(k_and_size):
    k, size = k_and_size
    chosen = index_codecs.choose("auto", k, size).num_words
    assert chosen == index_sizes.num_words("auto", k, size)
    if k < size:
        lengths = [
            codec(k, size).num_words
            for codec in index_codecs.CODECS.values()
            if not codec.is_variable
        ]
        assert chosen == min(lengths)


@pytest.mark.parametrize("n, k", [(8, 2), (4, 100), (3, 7)])
def test_owners_can_keep_all_sums(n, k):
    numbers = payload_sizes.Scattered.of(1000, n, k, 1.5, keep=n * n)
    assert numbers.to_all == min(n * numbers.to_owner, numbers.share)


@pytest.mark.parametrize("values", value_sizes.CODES)
@pytest.mark.parametrize("size, n, k", [(1000, 4, 20), (999, 32, 500)])
def test_owners_get_and_send_as_counted(size, n, k, values):
    default = tf_regtopk.ReduceScatter()
    codec = codecs.ScatteredCodec.of(
        codecs.Codec(values=values),
        ownership.Ownership(size, n),
        k,
        default.capacity,
        default.keep,
    )
    numbers = payload_sizes.Scattered.of(
        size, n, k, cost_model.OWNER_CAPACITY, cost_model.OWNER_KEEP
    )
    assert (numbers.to_owner, numbers.to_all) == (
        codec.to_owner.k,
        codec.to_all.k,
    )
    assert numbers.num_words_to_owner(values) == codec.num_words_to_owner
    assert numbers.num_words_to_all(values) == codec.num_words_to_all


@pytest.mark.parametrize(
    "workers, devices", [(2, 1), (3, 4), (1, 8), (64, 1), (32, 2)]
)
def test_predicted_bytes_are_those_of_the_topologies(workers, devices):
    job = job_lib.Job(
        10**6,
        workers,
        0.1,
        devices_lib.DEVICES["cpu"],
        devices_per_worker=devices,
    )
    network = network_lib.Network(1e9, 1e-4)
    members = job_lib.members(job)
    cluster = tf_regtopk.Cluster(job.num_devices, members.workers)
    payload = codecs.Codec().payload(job.num_selected, job.parameters)
    sent = {
        name: prediction.sent_bytes
        for name, prediction in cost_model.predict(job, network).items()
    }
    assert sent["coded"] == tf_regtopk.AllGather().worker_sent_bytes(
        4 * payload.num_words, cluster
    )
    assert sent["dense"] == tf_regtopk.AllReduce().worker_sent_bytes(
        job.gradient_bytes,
        tf_regtopk.Cluster(job.num_devices, job.num_devices),
    )
    if workers > 1 < devices:
        assert sent["hierarchical"] == (
            tf_regtopk.Hierarchical().worker_sent_bytes(
                4 * payload.num_words, cluster
            )
        )
    for name, topology in (
        ("owners", tf_regtopk.ReduceScatter()),
        ("owners by worker", tf_regtopk.ReduceScatter(hierarchical=True)),
    ):
        n = topology.num_participants(cluster)
        is_offered = n >= 32 and (not topology.hierarchical or devices > 1)
        assert (name in sent) == is_offered
        if is_offered:
            numbers = payload_sizes.Scattered.of(
                job.parameters, n, job.num_selected, 1.5, 1.0
            )
            words = numbers.num_words_to_owner("float32")
            words += numbers.num_words_to_all("float32")
            assert sent[name] == topology.worker_sent_bytes(
                4 * words * n, cluster
            )
