"""Numbers with units: read from text, and written."""

from collections.abc import Sequence
import math
import re
from typing import Literal

Kind = Literal["number", "rate", "time"]

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
# B stands for billions, as in the names of models ("7B").
_NUMBERS = {**_PREFIXES, "b": 1e9}
_RULES = {
    "number": "a positive number such as 25.6e6",
    "rate": "a positive rate such as 10Gbit",
    "time": "a time of at least 0 such as 50us",
}
_UNITS = {
    "number": "k, M, G or B (billions), T, or none",
    "rate": "bit/s (or bit, bps) and B/s (or B), with k, M, G or T before",
    "time": "ns, us, ms, s",
}


def parse(name: str, text: str, kind: Kind) -> float:
    """Reads a quantity with its unit.

    A `b` stands for bits and a `B` for bytes. `7B` parameters are 7 billion.
    A unit that has two meanings is refused, such as `10gb`.

    Args:
        name: Name of the argument, for the error.
        text: Quantity such as `"25.6e6"`, `"7B"`, `"10Gbit"`, `"10Gbps"`,
            `"1.25GB/s"` or `"0.2s"`.
        kind: `"number"`, `"rate"` or `"time"`.

    Returns:
        Float: a number, bytes per second, or seconds.

    Raises:
        ValueError: If the text is no quantity of that kind. The error lists the
            units, and what the text may mean.

    Example:

    >>> parse("bandwidth", "10Gbit", "rate")
    1250000000.0
    """
    match = re.fullmatch(
        r"(\d{1,3}(?:[,_]\d{3})+|\d+\.?\d*|\.\d+)((?:[eE][-+]?\d+)?) ?(.*)",
        text.strip(),
    )
    value = -1.0
    if match:
        number = float(re.sub("[,_]", "", match[1]) + match[2])
        value = number * _factor(match[3], kind)
    is_zero_time = value == 0 and kind == "time"
    if not (0 < value < math.inf or is_zero_time):
        hint = _hint(match[1] + match[2], match[3], name, kind) if match else ""
        raise ValueError(
            f"`{name}` must be {_RULES[kind]}. Received: {text}.{hint} "
            f"Units: {_UNITS[kind]}"
        )
    return value


def _factor(unit: str, kind: Kind) -> float:
    """Returns what the unit multiplies by, NaN if there is no such unit."""
    if kind == "time":
        return _TIMES.get(re.sub("[µμ]", "u", unit), math.nan)
    if kind == "number":
        return _NUMBERS.get(unit.lower(), math.nan)
    match = re.fullmatch(r"([kKmMgGtT]?)([a-zA-Z]+?)(/s|ps)?", unit)
    if not match:
        return math.nan
    prefix, base, second = match.groups()
    factor = _PREFIXES[prefix.lower()]
    if base.lower() in ("bit", "bits"):
        return factor / 8
    if base == "B" or base.lower() in ("byte", "bytes"):
        return factor
    # A small letter is a bit in the usual "Gb" and "gbps"; "gb" is anything.
    if base == "b" and (second == "ps" or prefix in ("k", "M", "G", "T")):
        return factor / 8
    return math.nan


def _hint(number: str, unit: str, name: str, kind: Kind) -> str:
    """Asks for the likely meaning, if there is one."""
    likely: tuple[str, ...] = ()
    if kind == "time":
        if unit.lower() in _TIMES:
            likely = (unit.lower(),)
        elif unit == "m":
            likely = ("ms",)
        elif not unit:
            likely = ("us", "ms") if "latency" in name else ("ms", "s")
    elif kind == "rate":
        prefix = unit[:1].upper().replace("K", "k")
        if unit.lower() in ("k", "m", "g", "t"):
            likely = (f"{prefix}bit", f"{prefix}B")
        elif re.fullmatch(r"[kKmMgGtT]?b(/s)?", unit):
            prefix = prefix if len(unit.removesuffix("/s")) == 2 else ""
            likely = (f"{prefix}bit", f"{prefix}B")
        elif not unit:
            likely = ("Mbit", "Gbit")
    if not likely or not float(number.replace(",", "").replace("_", "")):
        return ""
    return f" Did you mean {' or '.join(number + unit for unit in likely)}?"


def seconds(value: float) -> str:
    """Writes seconds, such as `"180 ms"`."""
    return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "us")))


def num_bytes(value: float) -> str:
    """Writes bytes, such as `"102 MB"`."""
    return _scaled(
        value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    )


def bit_rate(bytes_per_second: float) -> str:
    """Writes the rate of a network, such as `"10.0 Gbit/s"`."""
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    return _scaled(8 * bytes_per_second, [(f, f"{u}bit/s") for f, u in units])


def byte_rate(bytes_per_second: float) -> str:
    """Writes the rate of a memory, such as `"1.73 TB/s"`."""
    return f"{num_bytes(bytes_per_second)}/s"


def count(value: float) -> str:
    """Writes a number, such as `"25.6 million"`."""
    if value < 1e6:
        return f"{value:,.0f}"
    return _scaled(value, ((1e9, "billion"), (1e6, "million")))


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    factor, unit = next((u for u in units if number >= u[0]), units[-1])
    digits = max(0, 2 - math.floor(math.log10(max(number / factor, 1))))
    return f"{number / factor:.{digits}f} {unit}"
