"""The cost model, against a simulation of every packet and measurements."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import network_simulation
import planning_jobs
import pytest

import tf_regtopk
from tf_regtopk import advise
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import network as network_lib

# So fast that only links take time.
FAST_MEMORY = 1e18


# Bandwidth in bytes a second, latency in seconds.
NETWORKS = {
    "100 Mbit/s": (12.5e6, 200e-6),
    "1 Gbit/s": (125e6, 100e-6),
    "10 Gbit/s": (1.25e9, 50e-6),
    "100 Gbit/s": (12.5e9, 5e-6),
    "far": (1.25e9, 5e-3),
    "far and slow": (12.5e6, 20e-3),
}


def exchange_seconds(name, job, network):
    return cost_model.predict(job, network)[name].exchange_seconds


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_as_simulated(name):
    network = network_lib.Network(*NETWORKS[name])
    for num_workers in (2, 3, 4, 16, 64, 512, 4096):
        for parameters in (10**5, 10**7):
            job = planning_jobs.make_job(
                parameters=parameters,
                workers=num_workers,
                memory_bandwidth=FAST_MEMORY,
            )
            simulated = network_simulation.ring(
                4 * parameters,
                num_workers,
                *NETWORKS[name],
                network_lib.WINDOW_BYTES,
                network_lib.RING_TRIPS,
            )
            predicted = exchange_seconds("dense", job, network)
            assert predicted == pytest.approx(simulated, rel=0.1), job


@pytest.mark.parametrize("name", NETWORKS)
def test_sparse_as_simulated(name):
    network = network_lib.Network(*NETWORKS[name])
    for num_workers, densities in (
        (2, (1e-4, 1e-3, 1e-2, 0.1, 1)),
        (4, (1e-4, 1e-3, 1e-2, 0.1)),
        (16, (1e-4, 1e-3, 1e-2, 0.1)),
        (64, (1e-4, 1e-3, 1e-2)),
        (512, (1e-4, 1e-3)),
        (4096, (1e-5, 1e-4)),
    ):
        for density in densities:
            job = planning_jobs.make_job(
                workers=num_workers,
                density=density,
                memory_bandwidth=FAST_MEMORY,
            )
            entry_bytes = 8 if density < 1 else 4
            simulated = network_simulation.gather(
                entry_bytes * job.num_selected,
                num_workers,
                *NETWORKS[name],
                network_lib.WINDOW_BYTES,
                network_lib.GATHER_TRIPS,
            )
            predicted = exchange_seconds("sparse", job, network)
            assert predicted == pytest.approx(simulated, rel=0.1), job


@pytest.mark.parametrize("name", ["1 Gbit/s", "10 Gbit/s", "far"])
@pytest.mark.parametrize("num_workers, devices", [(2, 4), (4, 8), (512, 2)])
def test_several_devices_as_simulated(num_workers, devices, name):
    bandwidth, latency = NETWORKS[name]
    network = network_lib.Network(bandwidth, latency)
    local = (network.local_bandwidth, network.local_latency)
    job = planning_jobs.make_job(
        workers=num_workers,
        devices_per_worker=devices,
        memory_bandwidth=FAST_MEMORY,
    )

    def check(name, *simulated):
        predicted = exchange_seconds(name, job, network)
        assert predicted == pytest.approx(sum(simulated), rel=0.1), name

    def ring(num_members, bandwidth, latency):
        return network_simulation.ring(
            4 * job.parameters,
            num_members,
            bandwidth,
            latency,
            network_lib.WINDOW_BYTES,
            network_lib.RING_TRIPS,
        )

    def gather(num_bytes, num_members, bandwidth, latency):
        return network_simulation.gather(
            num_bytes,
            num_members,
            bandwidth,
            latency,
            network_lib.WINDOW_BYTES,
            network_lib.GATHER_TRIPS,
        )

    # One ring, which enters each worker once.
    enters = [i % devices == 0 for i in range(num_workers * devices)]
    check(
        "dense",
        ring(
            len(enters),
            [bandwidth if enter else local[0] for enter in enters],
            [latency if enter else local[1] for enter in enters],
        ),
    )
    inside = ring(devices, *local)
    check("dense by worker", inside, ring(num_workers, bandwidth, latency))
    k = job.num_selected
    check(
        "sparse",
        gather(devices**2 * 8 * k, num_workers, bandwidth, latency),
    )
    payload = 4 * tf_regtopk.Codec().payload(k, job.parameters).num_words
    check(
        "hierarchical",
        inside,
        gather(payload, num_workers, bandwidth, latency),
        gather((num_workers - 1) * payload, 2, *local),
    )


@pytest.mark.parametrize(
    "megabytes_a_second, latency, local, measured",
    [
        (11.95, 3e-5, 0.1047, 6.009),
        (119.5, 2e-5, 0.1028, 0.879),
        (294, 5.2e-3, 0.0956, 0.606),
        (3370, 2e-5, 0.0898, 0.437),
    ],
)
def test_as_measured(megabytes_a_second, latency, local, measured):
    """All-reduces of benchmarks/cluster, which `network.py` is fitted to."""
    job = planning_jobs.make_job(
        parameters=10_997_206, workers=4, step_seconds=local
    )
    network = network_lib.Network(1e6 * megabytes_a_second, latency)
    predicted = cost_model.predict(job, network)["dense"].step_seconds
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("density", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize(
    "parameters, pass_seconds", [(11_200_000, 4.3e-3), (25_600_000, 1e-2)]
)
def test_compression_as_measured(parameters, pass_seconds, density):
    """docs/benchmarks.md: a step, flattening, splitting and a sum of 8."""
    memory_bandwidth = 12 * parameters / pass_seconds
    job = planning_jobs.make_job(
        parameters=parameters,
        density=density,
        memory_bandwidth=memory_bandwidth,
    )
    # Entries as they are need next to no reading and writing.
    predicted = cost_model.compression_seconds(job, "int32", 8)
    predicted = (predicted - cost_model.START_SECONDS) / pass_seconds
    step = {1e-3: 2.35, 1e-2: 3.2, 0.1: 7.8}[density]
    added = {1e-3: 0.6, 1e-2: 1.8, 0.1: 3.5}[density]
    reading = {1e-3: 0.3, 1e-2: 0.6, 0.1: 3.2}[density]
    assert predicted == pytest.approx(step + 1.1 + added + reading, rel=0.2)


jobs = st.builds(
    cost_model.Job,
    parameters=st.integers(1, 10**9),
    workers=st.integers(2, 5000),
    step_seconds=st.floats(0, 10),
    density=st.floats(1e-6, 1),
    values=st.sampled_from(["float32", "natural", "ternary"]),
    devices_per_worker=st.integers(1, 8),
    overlap=st.floats(0, 1),
    memory_bandwidth=st.floats(1e8, 1e13),
)


networks = st.builds(
    network_lib.Network,
    bandwidth=st.floats(1e4, 1e12),
    latency=st.floats(0, 1),
    local_bandwidth=st.floats(1e6, 1e13),
    local_latency=st.floats(0, 1e-2),
)


def assert_all_at_least(slower, faster):
    for name, prediction in slower.items():
        for field in dataclasses.fields(prediction):
            larger = getattr(prediction, field.name)
            smaller = getattr(faster[name], field.name)
            # Codes fill whole words.
            assert larger >= smaller * (1 - 1e-9) - 1e-9, (name, field.name)


@hypothesis.given(jobs, networks, st.floats(1, 100))
def test_a_worse_network_is_not_faster(job, network, factor):
    predictions = cost_model.predict(job, network)
    for change in (
        {"bandwidth": network.bandwidth / factor},
        {"latency": network.latency * factor},
        {"local_bandwidth": network.local_bandwidth / factor},
        {"local_latency": network.local_latency * factor},
    ):
        worse = dataclasses.replace(network, **change)
        assert_all_at_least(cost_model.predict(job, worse), predictions)


@hypothesis.given(jobs, networks, st.integers(2, 10))
def test_more_is_not_faster(job, network, factor):
    predictions = cost_model.predict(job, network)
    for change in (
        {"step_seconds": job.step_seconds * factor},
        {"density": min(0.25, job.density * factor)},
        {"parameters": min(2**31 - 1, job.parameters * factor)},
        {"memory_bandwidth": job.memory_bandwidth / factor},
    ):
        # Of all entries no index is written.
        if "density" in change and job.num_selected > job.parameters // 8:
            continue
        more = dataclasses.replace(job, **change)
        assert_all_at_least(cost_model.predict(more, network), predictions)


@hypothesis.given(jobs, networks)
def test_overlap_hides_dense_exchanges_only(job, network):
    before = cost_model.predict(dataclasses.replace(job, overlap=0.0), network)
    for name, after in cost_model.predict(job, network).items():
        hidden = before[name].step_seconds - after.step_seconds
        most = min(job.step_seconds, job.overlap * after.exchange_seconds)
        if not planning_jobs.METHODS[name].is_dense:
            most = 0.0
        assert hidden == pytest.approx(most, rel=1e-6, abs=1e-9)


CASES = [
    (planning_jobs.make_job(), network_lib.Network(1.25e9, 50e-6)),
    (
        planning_jobs.make_job(parameters=11_200_000, workers=4),
        network_lib.Network(12.5e6, 1e-4),
    ),
    (
        planning_jobs.make_job(devices_per_worker=8, overlap=0.5),
        network_lib.Network(1.25e9, 1e-5),
    ),
    (
        planning_jobs.make_job(memory_bandwidth=1e12),
        network_lib.Network(12.5e9, 5e-6),
    ),
    (
        planning_jobs.make_job(parameters=1000),
        network_lib.Network(1.25e9, 5e-6),
    ),
    (
        planning_jobs.make_job(density=0.1, values="natural"),
        network_lib.Network(125e6, 5e-3),
    ),
]


@pytest.mark.parametrize("job, network", CASES)
def test_crossovers(job, network):
    for method in cost_model.methods(job):
        if not method.is_dense:
            check_crossovers(method, job, network)


def check_crossovers(method, job, network):
    def wins(**changes):
        trial = dataclasses.replace(job, **changes)
        step_seconds = method.cost(trial, network).step_seconds
        return step_seconds < crossover.fastest_dense(trial, network)

    workers = crossover.last_workers(method, job, network)
    if workers:
        assert wins(workers=workers)
    if workers < crossover.MAX_WORKERS:
        for more in (1, 2, workers, 100 * workers):
            assert not wins(workers=max(2, workers + more))
    density = crossover.last_density(method, job, network)
    k = round(density * job.parameters)
    if k:
        assert wins(density=k / job.parameters)
    for more in (1, 2, k, job.parameters):
        if k < job.parameters - 1:
            larger = min(k + max(more, 1), job.parameters - 1)
            assert not wins(density=larger / job.parameters)


def test_crossovers_without_end():
    """Every worker more costs a ring more time than an all-gather."""
    network = network_lib.Network(1.25e9, 20e-3)
    job = planning_jobs.make_job(parameters=10**5)
    sparse = planning_jobs.METHODS["sparse"]
    assert crossover.last_workers(sparse, job, network) == crossover.MAX_WORKERS
    assert crossover.last_density(sparse, job, network) == 1 - 1e-5
    assert "any number of workers" in advise.table(job, network)


@hypothesis.given(jobs, networks)
@hypothesis.settings(max_examples=50)
def test_advice_is_about_as_fast_as_any(job, network):
    predictions = cost_model.predict(job, network)
    method, text = advise.recommend(job, network)
    fastest = min(p.step_seconds for p in predictions.values())
    taken = predictions[method.name].step_seconds
    assert taken <= (1 + advise.TOLERANCE) * fastest
    dense = min(
        p.step_seconds
        for n, p in predictions.items()
        if planning_jobs.METHODS[n].is_dense
    )
    assert method.is_dense == (dense <= (1 + advise.TOLERANCE) * fastest)
    assert text.startswith("Do not compress" if method.is_dense else "Compress")
