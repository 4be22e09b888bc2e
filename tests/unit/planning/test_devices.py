"""Devices and their memory."""

import pytest

from tf_regtopk.planning import devices


def test_data_sheets():
    """Programs reach less than the data sheet says."""
    h200 = devices.DEVICES["h200"]
    # An H200 copied at this rate, see docs/benchmarks.md.
    assert 3.9e12 < h200.memory_bandwidth < 4.2e12
    assert "4800 GB/s" in h200.source
    for name, device in devices.DEVICES.items():
        assert device.name == name
        assert device.is_accelerator == (name != "cpu")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "8GB"])
def test_wrong_bandwidth(value):
    with pytest.raises(
        (TypeError, ValueError), match="`memory_bandwidth` must be a positive"
    ):
        devices.with_bandwidth(devices.DEVICES["cpu"], value)


def test_measures_this_machine():
    measured = devices.measure_memory_bandwidth(num_floats=2**18, num_rounds=3)
    assert 1e8 < measured < 1e14
