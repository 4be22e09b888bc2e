"""The advice, and where it flips."""

import dataclasses

import hypothesis
import planning_jobs
import pytest

from tf_regtopk.planning import advice as advice_lib
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import devices
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib

RESNET = job_lib.Job(25_600_000, 16, 0.18, devices.DEVICES["v100"])
TEN_GIGABIT = network_lib.Network(1.25e9, 50e-6)


@hypothesis.given(planning_jobs.JOBS, planning_jobs.NETWORKS)
@hypothesis.settings(max_examples=50)
def test_advice_is_about_as_fast_as_any(job, network):
    predictions = cost_model.predict(job, network)
    advice = advice_lib.advise(job, network)
    fastest = min(p.step_seconds for p in predictions.values())
    taken = predictions[advice.method.name].step_seconds
    assert taken == advice.step_seconds
    assert taken <= (1 + advice_lib.TOLERANCE) * fastest
    dense = min(
        p.step_seconds
        for n, p in predictions.items()
        if planning_jobs.METHODS[n].is_dense
    )
    assert dense == advice.dense_seconds
    is_dense = dense <= (1 + advice_lib.TOLERANCE) * fastest
    assert advice.method.is_dense == is_dense
    assert (advice.answer == "do not compress") == is_dense
    text = advice_lib.text(advice)
    assert text.lower().startswith(advice.answer)


def test_the_answer_by_speed_up():
    """A fast network, an ordinary one, and a slow one."""
    for bandwidth, answer in (
        (50e9, "do not compress"),
        (1.25e9, "compress only if"),
        (125e6, "compress"),
    ):
        network = network_lib.Network(bandwidth, 50e-6)
        assert advice_lib.advise(RESNET, network).answer == answer


def test_a_small_gain_is_conditional():
    text = advice_lib.text(advice_lib.advise(RESNET, TEN_GIGABIT))
    assert text.startswith(
        "Compress only if your training then needs less than 1.8"
    )
    assert "steps of dense training" in text


def test_a_fast_network_is_not_capped_by_the_device():
    """In 0.1 the memory of a small CPU was assumed, at any bandwidth."""
    network = network_lib.Network(50e9, 5e-6)
    for device in devices.DEVICES.values():
        job = dataclasses.replace(RESNET, device=device)
        is_capped = network.link(device).bandwidth < 10e9
        assert is_capped == (device.name == "cpu")
        seconds = cost_model.predict(job, network)["dense"].exchange_seconds
        wire = 2 * 15 / 16 * job.gradient_bytes / 50e9
        assert device.name == "cpu" or seconds < 2.2 * wire


def test_a_nominal_bandwidth_is_doubted():
    """Where a third of it would lead to another answer, and only there."""
    nominal = network_lib.Network(12.5e9, 5e-6)
    text = advice_lib.if_less_is_reached(RESNET, nominal)
    assert "33.3 Gbit/s, the answer is: compress only if. " in text
    cpu = dataclasses.replace(RESNET, device=devices.DEVICES["cpu"])
    host = dataclasses.replace(RESNET, workers=1, devices_per_worker=8)
    for job, network in (
        (cpu, nominal),
        (host, nominal),
        (RESNET, TEN_GIGABIT),
        (RESNET, network_lib.Network(50e9, 5e-6)),
    ):
        assert not advice_lib.if_less_is_reached(job, network)


@pytest.mark.parametrize(
    "job, network",
    [
        (RESNET, TEN_GIGABIT),
        (
            dataclasses.replace(RESNET, workers=1, devices_per_worker=8),
            TEN_GIGABIT,
        ),
    ],
)
def test_changes_are_where_the_answer_flips(job, network):
    lines = advice_lib.changes(job, network).splitlines()
    found = {line.split()[0]: line for line in lines if line[:2] == "  "}
    is_one = job.workers == 1
    bandwidth = "local_bandwidth" if is_one else "bandwidth"
    assert bandwidth in found
    now = advice_lib.advise(job, network).answer
    for varied in advice_lib._inputs(job, network):

        def answer(value, varied=varied):
            return advice_lib.advise(*varied.replaced(value)).answer

        below, above = crossover.nearest_changes(
            answer, varied.value, varied.low, varied.high
        )
        if below is None and above is None:
            assert varied.name not in found
        for change, side, inside in (
            (below, "below", 1.01),
            (above, "above", 1 / 1.01),
        ):
            if change:
                value, other = change
                text = f"{side} {varied.write(value)}: {other}"
                assert text in found[varied.name]
                assert answer(value) == other != now
                if varied.name not in ("workers", "devices_per_worker"):
                    assert answer(value * inside) == now


def test_by_device():
    jobs = [
        (dataclasses.replace(RESNET, device=device), TEN_GIGABIT)
        for device in (devices.DEVICES["cpu"], devices.DEVICES["a100"])
    ]
    assert advice_lib.by_device(jobs) == {
        "compress": ["cpu"],
        "compress only if": ["a100"],
    }
