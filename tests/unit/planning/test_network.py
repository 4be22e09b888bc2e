"""Networks, and numbers with units."""

import pytest

from tf_regtopk import advise


def test_units():
    for text, kind, expected in (
        ("25.6e6", "number", 25.6e6),
        ("11.2M", "number", 11.2e6),
        ("1000", "number", 1000),
        ("10Gbit", "rate", 1.25e9),
        ("100Mbit", "rate", 12.5e6),
        ("100 Mbit/s", "rate", 12.5e6),
        ("1.25GB", "rate", 1.25e9),
        ("8GB/s", "rate", 8e9),
        ("5e3kB", "rate", 5e6),
        ("50us", "time", 50e-6),
        ("5ms", "time", 5e-3),
        (" 180ms ", "time", 0.18),
        ("0.2s", "time", 0.2),
        (".2s", "time", 0.2),
        ("0s", "time", 0),
    ):
        parsed = advise.parse("argument", text, kind)
        assert parsed == pytest.approx(expected), text


@pytest.mark.parametrize(
    "kind, rule, texts",
    [
        (
            "rate",
            "a positive rate such as 10Gbit",
            ["10 bananas", "10", "0Gbit", "-1Gbit", "1.2.3Gbit", "10gbit"]
            + ["10ms", "1e999GB", "", "10GB/h", "Gbit"],
        ),
        (
            "time",
            "a time of at least 0 such as 50us",
            ["50", "50us/s", "-5ms", "5Gbit"],
        ),
        (
            "number",
            "a positive number such as 25.6e6",
            ["nan", "0", "five", "inf"],
        ),
    ],
)
def test_wrong_units(kind, rule, texts):
    for text in texts:
        with pytest.raises(ValueError) as error:
            advise.parse("argument", text, kind)
        message = f"`argument` must be {rule}. Received: {text}"
        assert str(error.value) == message
