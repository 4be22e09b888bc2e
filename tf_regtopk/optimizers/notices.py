"""The lines that tell users what an optimizer does, once and in time."""

from tf_regtopk import codecs
from tf_regtopk.log import logger

# Fewer entries than this change a model too slowly.
_FEW_ENTRIES = 1000


def tell_what_is_sent(
    report: codecs.WireReport, sparsifier: str, density: float
) -> None:
    """Logs what a replica sends per step, and warns of what is unusual.

    Args:
        report: `WireReport` of the optimizer.
        sparsifier: Name of the sparsifier.
        density: The share of the entries that is sent.
    """
    line = _line(report, sparsifier, density)
    if report.measured:
        line += f" Measured a step: {report.measured}."
    logger.info("%s", line)
    for warning in _warnings(report):
        logger.warning("%s", warning)


def _line(report: codecs.WireReport, sparsifier: str, density: float) -> str:
    dense = _bytes(report.dense_bytes)
    if not report.num_selected:
        return (
            f"Dense exchange: {dense} a step, all-reduce of "
            f"{report.num_replicas} replicas."
        )
    selected = (
        f"{sparsifier} {100 * density:.3g} %: {report.num_selected:,} of "
        f"{_count(report.num_entries)} entries"
    )
    if report.num_replicas == 1:
        return f"{selected}, by a single {report.participant}."
    sent = report.payload_bytes + report.dense_below_bytes
    return (
        f"{selected}, {_bytes(sent)} a step instead of {dense}, "
        f"{report.topology} of {report.num_replicas} {report.participant}s."
    )


def _warnings(report: codecs.WireReport) -> list[str]:
    k, size = report.num_selected, report.num_entries
    warnings = []
    if k == size:
        pass
    elif report.num_replicas == 1:
        warnings.append(
            f"There is a single {report.participant}: no entry is sent, and "
            "entries are held back all the same. If there are several devices, "
            "build, compile and load the model in `strategy.scope()`. If not, "
            "train with the inner optimizer alone, or with "
            '`exchange="auto"`.'
        )
    elif report.sent_bytes >= report.dense_sent_bytes:
        warnings.append(
            f"A {report.participant} sends {_bytes(report.sent_bytes)} a step, "
            f"and {_bytes(report.dense_sent_bytes)} without the wrapper. "
            "Choose a lower `density` (with `methods.recommended` a larger "
            '`compression`) or `exchange="dense"`.'
        )
    if 0 < k < min(_FEW_ENTRIES, size):
        warnings.append(
            f"Only {k:,} entries are sent per step, which trains most models "
            f"slowly or badly. A sparsifier sends at least {_FEW_ENTRIES:,} "
            "without `density`, and `methods.recommended` more with a smaller "
            "`compression`, of which 40 is the least. A small model may train "
            "well all the same: compare its loss with that of dense training."
        )
    return warnings


def _count(number: int) -> str:
    """A number in three digits or so: 25.6M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _bytes(number: float) -> str:
    """A number of bytes in three digits or so: 102 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"
