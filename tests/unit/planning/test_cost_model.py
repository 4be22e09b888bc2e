"""The cost model, against a simulation of every packet and measurements."""

import dataclasses
import json
import statistics

import hypothesis
from hypothesis import strategies as st
import network_simulation
import paths
import planning_jobs
import pytest

from benchmarks.cluster import published_validation
import tf_regtopk
from tf_regtopk import codecs
from tf_regtopk.kernels import ownership
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import devices as devices_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.planning import report

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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_workers", [32, 512, 4096])
def test_owners_as_simulated(num_workers, name):
    """Two rounds of small messages, whose sum does not grow with N."""
    for density in (1e-3, 1e-2):
        job = planning_jobs.make_job(
            workers=num_workers,
            density=density,
            memory_bandwidth=FAST_MEMORY,
        )
        codec = codecs.ScatteredCodec.of(
            tf_regtopk.Codec(),
            ownership.Ownership(job.parameters, num_workers),
            job.num_selected,
            capacity=1.5,
            keep=1.0,
        )
        simulated = sum(
            network_simulation.gather(
                4 * num_words,
                num_workers,
                *NETWORKS[name],
                network_lib.WINDOW_BYTES,
                network_lib.GATHER_TRIPS,
            )
            for num_words in (codec.num_words_to_owner, codec.num_words_to_all)
        )
        prediction = cost_model.predict(
            job, network_lib.Network(*NETWORKS[name])
        )["owners"]
        assert prediction.exchange_seconds == pytest.approx(simulated, rel=0.1)
        expected = (
            (num_workers - 1)
            * 4
            * (codec.num_words_to_owner + codec.num_words_to_all)
        )
        assert prediction.sent_bytes == pytest.approx(expected)


@pytest.mark.parametrize("density", [1e-3, 1e-2])
@pytest.mark.parametrize("name", ["1 Gbit/s", "10 Gbit/s", "far"])
def test_owners_never_lose_to_dense(name, density):
    network = network_lib.Network(*NETWORKS[name])
    for num_workers in (32, 128, 512, 1024, 4096):
        job = planning_jobs.make_job(
            parameters=25_600_000,
            workers=num_workers,
            density=density,
            memory_bandwidth=8e9,
        )
        predicted = cost_model.predict(job, network)
        owners, dense = predicted["owners"], predicted["dense"]
        assert owners.step_seconds < dense.step_seconds, num_workers


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
    if num_workers < cost_model.LEAST_OWNERS:
        return
    codec = codecs.ScatteredCodec.of(
        tf_regtopk.Codec(),
        ownership.Ownership(job.parameters, num_workers),
        k,
        capacity=1.5,
        keep=1.0,
    )
    rounds = 4 * codec.num_words_to_owner, 4 * codec.num_words_to_all
    check(
        "owners by worker",
        inside,
        *(gather(b, num_workers, bandwidth, latency) for b in rounds),
        *(gather((num_workers - 1) * b, 2, *local) for b in rounds),
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
    predicted = (predicted - job.device.start_seconds) / pass_seconds
    step = {1e-3: 2.35, 1e-2: 3.2, 0.1: 7.8}[density]
    added = {1e-3: 0.6, 1e-2: 1.8, 0.1: 3.5}[density]
    reading = {1e-3: 0.3, 1e-2: 0.6, 0.1: 3.2}[density]
    assert predicted == pytest.approx(step + 1.1 + added + reading, rel=0.2)


def assert_all_at_least(slower, faster):
    for name, prediction in slower.items():
        for field in dataclasses.fields(prediction):
            larger = getattr(prediction, field.name)
            smaller = getattr(faster[name], field.name)
            # Codes fill whole words.
            assert larger >= smaller * (1 - 1e-9) - 1e-9, (name, field.name)


@hypothesis.given(planning_jobs.JOBS, planning_jobs.NETWORKS, st.floats(1, 100))
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


@hypothesis.given(
    planning_jobs.JOBS, planning_jobs.NETWORKS, st.integers(2, 10)
)
def test_more_is_not_faster(job, network, factor):
    predictions = cost_model.predict(job, network)
    for change in (
        {"step_seconds": job.step_seconds * factor},
        {"density": min(0.25, job.density * factor)},
        {"parameters": min(2**31 - 1, job.parameters * factor)},
        {
            "device": devices_lib.with_bandwidth(
                job.device, job.device.memory_bandwidth / factor
            )
        },
    ):
        # Of all entries no index is written.
        if "density" in change and job.num_selected > job.parameters // 8:
            continue
        more = dataclasses.replace(job, **change)
        assert_all_at_least(cost_model.predict(more, network), predictions)


@hypothesis.given(planning_jobs.JOBS, planning_jobs.NETWORKS)
def test_overlap_hides_dense_exchanges_only(job, network):
    before = cost_model.predict(dataclasses.replace(job, overlap=0.0), network)
    for name, after in cost_model.predict(job, network).items():
        hidden = before[name].step_seconds - after.step_seconds
        most = min(
            cost_model.BACKWARD_SHARE * job.step_seconds,
            job.overlap * after.exchange_seconds,
        )
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
    assert "any number of workers" in report.table(job, network)


def test_one_host_is_its_devices_as_workers():
    """With links as fast, and without software between hosts."""
    device = devices_lib.DEVICES["h100"]
    network = network_lib.Network(1.0, 1.0, 12.5e9, 1e-5)
    host = planning_jobs.make_job(
        workers=1, devices_per_worker=8, device=device
    )
    fast = dataclasses.replace(device, memory_bandwidth=1e18)
    hosts = planning_jobs.make_job(workers=8, device=device)
    predictions = cost_model.predict(host, network)
    assert set(predictions) == {"dense", "coded", "natural", "sparse"}
    link = network_lib.Network(12.5e9, 1e-5).link(fast)
    assert predictions["dense"].exchange_seconds == pytest.approx(
        network_lib.ring_seconds(8, 4 * host.parameters, link)
    )
    for name, prediction in cost_model.predict(
        hosts, network_lib.Network(12.5e9, 1e-5)
    ).items():
        assert predictions[name].sent_bytes == prediction.sent_bytes
        assert predictions[name].step_seconds == pytest.approx(
            prediction.step_seconds, rel=0.02
        )


def cluster_table():
    """The columns of the table of docs/benchmarks.md, by the rows' names."""
    text = (paths.ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    text = text.split("## Between hosts")[1].split("\n![")[0]
    rows = {}
    for line in text.splitlines():
        name, *cells = [cell.strip(" *") for cell in line[1:-1].split("|")]
        if len(cells) == 8 and cells[0][-1].isdigit():
            rows[name] = [float(cell.replace(",", "")) for cell in cells]
    return rows


def test_as_the_cluster_benchmark():
    """The prediction of each dense and sparse cell that the docs publish."""
    rows = cluster_table()
    # The docs have speed-ups; the same run has measured throughput and delay.
    networks = [
        (11.96e6, 4.9e-5),
        (119.3e6, 4.1e-5),
        (284.8e6, 5.22e-3),
        (2.735e9, 5.4e-5),
    ]
    names = {"raw": "sparse", "coded": "coded", "natural": "natural"}
    errors = []
    for i, milliseconds in enumerate(rows["dense, milliseconds"]):
        local = milliseconds / rows["no exchange at all, Keras"][i]
        network = network_lib.Network(*networks[i % 4])
        for density in (0.1, 1):
            job = planning_jobs.make_job(
                parameters=10**6 if i < 4 else 10_997_206,
                workers=4,
                step_seconds=local / 1e3,
                density=density / 100,
            )
            predictions = cost_model.predict(job, network)
            measured = {
                name: milliseconds / rows[f"sparse {density} %, {row}"][i]
                for row, name in names.items()
            }
            if density == 0.1:
                measured["dense"] = milliseconds
            for name, value in measured.items():
                predicted = 1e3 * predictions[name].step_seconds
                errors.append(abs(predicted / value - 1))
    assert len(errors) == 56
    assert statistics.median(errors) < 0.15
    assert max(errors) < 0.3


def test_as_published():
    """The ratios that docs/benchmarks.md reports, good ones and bad ones."""
    steps = json.loads(published_validation.PUBLISHED.read_text("utf-8"))
    found = published_validation.ratios(steps["steps"])
    text = (paths.ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    for step, ratio in zip(steps["steps"], found, strict=True):
        [row] = [
            x
            for x in text.splitlines()
            if x[2:].startswith(step["name"] + " |")
        ]
        assert row.endswith(f" {ratio:.2f} |"), row
    assert sum(max(r, 1 / r) <= 1.5 for r in found) >= 8
