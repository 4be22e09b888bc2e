"""Numbers with units."""

import pytest

from tf_regtopk.planning import quantities


def test_units():
    for text, kind, expected in (
        ("25.6e6", "number", 25.6e6),
        ("11.2M", "number", 11.2e6),
        ("1000", "number", 1000),
        ("25,600,000", "number", 25.6e6),
        ("25_600_000", "number", 25.6e6),
        ("7B", "number", 7e9),
        ("1.5b", "number", 1.5e9),
        ("10Gbit", "rate", 1.25e9),
        ("10Gbps", "rate", 1.25e9),
        ("10gbps", "rate", 1.25e9),
        ("10Gb/s", "rate", 1.25e9),
        ("10gbit", "rate", 1.25e9),
        ("100Mbit", "rate", 12.5e6),
        ("100 Mbit/s", "rate", 12.5e6),
        ("1.25GB", "rate", 1.25e9),
        ("1.25GBps", "rate", 1.25e9),
        ("8GB/s", "rate", 8e9),
        ("5e3kB", "rate", 5e6),
        ("50us", "time", 50e-6),
        ("50µs", "time", 50e-6),
        ("5ms", "time", 5e-3),
        (" 180ms ", "time", 0.18),
        ("0.2s", "time", 0.2),
        (".2s", "time", 0.2),
        ("0s", "time", 0),
    ):
        parsed = quantities.parse("argument", text, kind)
        assert parsed == pytest.approx(expected), text


@pytest.mark.parametrize(
    "kind, rule, units, texts",
    [
        (
            "rate",
            "a positive rate such as 10Gbit",
            "Units: bit/s (or bit, bps) and B/s (or B), with k, M, G or T ",
            ["10 bananas", "0Gbit", "-1Gbit", "1.2.3Gbit"]
            + ["10ms", "1e999GB", "", "10GB/h", "Gbit"],
        ),
        (
            "time",
            "a time of at least 0 such as 50us",
            "Units: ns, us, ms, s",
            ["50us/s", "-5ms", "5Gbit"],
        ),
        (
            "number",
            "a positive number such as 25.6e6",
            "Units: k, M, G or B (billions), T, or none",
            ["nan", "0", "five", "inf", "25,6"],
        ),
    ],
)
def test_wrong_units(kind, rule, units, texts):
    for text in texts:
        with pytest.raises(ValueError) as error:
            quantities.parse("argument", text, kind)
        message = f"`argument` must be {rule}. Received: {text}. {units}"
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "name, text, kind, likely",
    [
        ("step_time", "180", "time", "180ms or 180s"),
        ("step_time", "180 MS", "time", "180ms"),
        ("step_time", "180m", "time", "180ms"),
        ("latency", "50", "time", "50us or 50ms"),
        ("bandwidth", "10", "rate", "10Mbit or 10Gbit"),
        ("bandwidth", "10G", "rate", "10Gbit or 10GB"),
        ("bandwidth", "10gb", "rate", "10Gbit or 10GB"),
        ("bandwidth", "10mb/s", "rate", "10Mbit or 10MB"),
        ("bandwidth", "10b", "rate", "10bit or 10B"),
    ],
)
def test_ambiguous_units(name, text, kind, likely):
    with pytest.raises(ValueError) as error:
        quantities.parse(name, text, kind)
    assert f"Received: {text}. Did you mean {likely}? " in str(error.value)


def test_written():
    assert quantities.seconds(0.18) == "180 ms"
    assert quantities.num_bytes(102.4e6) == "102 MB"
    assert quantities.num_bytes(0) == "0.00 B"
    assert quantities.bit_rate(1.25e9) == "10.0 Gbit/s"
    assert quantities.byte_rate(1.73e12) == "1.73 TB/s"
    assert quantities.count(25.6e6) == "25.6 million"
    assert quantities.count(1000) == "1,000"
