"""Jobs for the cost model."""

from hypothesis import strategies as st

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import devices
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network

METHODS = {method.name: method for method in cost_model.METHODS}


def cpu(memory_bandwidth=8e9):
    """A CPU, by default of 4 processes on the machine of docs/benchmarks.md."""
    return devices.with_bandwidth(devices.DEVICES["cpu"], memory_bandwidth)


def make_job(memory_bandwidth=8e9, **kwargs):
    defaults = {
        "parameters": 10**7,
        "workers": 16,
        "step_seconds": 0.2,
        "device": cpu(memory_bandwidth),
    }
    return job_lib.Job(**(defaults | kwargs))


JOBS = st.builds(
    job_lib.Job,
    parameters=st.integers(1, 10**9),
    workers=st.integers(2, 5000),
    step_seconds=st.floats(0, 10),
    density=st.floats(1e-6, 1),
    values=st.sampled_from(["float32", "natural", "ternary"]),
    devices_per_worker=st.integers(1, 8),
    overlap=st.floats(0, 1),
    device=st.builds(
        devices.with_bandwidth,
        st.sampled_from([*devices.DEVICES.values()]),
        st.floats(1e8, 1e13),
    ),
)


NETWORKS = st.builds(
    network.Network,
    bandwidth=st.floats(1e4, 1e12),
    latency=st.floats(0, 1),
    local_bandwidth=st.floats(1e6, 1e13),
    local_latency=st.floats(0, 1e-2),
)
