r"""What the records of `step.py` say: tables, and a figure.

    python -m benchmarks.cluster.report results/cluster/summary.json

prints the table of `docs/benchmarks.md`.
"""

import json
import statistics
import sys

# Times of the same step without any exchange, which others are compared with.
LOCAL = {"tensorflow": "local", "torch": "torch_local"}
# Milliseconds that have a label in the figure.
_TICKS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
_CODES = {"int32+float32": "raw", "auto": "coded", "auto+float32": "coded"}


def kind_of(method):
    """`"torch"` or `"tensorflow"`, which runs a method."""
    return "torch" if method.startswith(("ddp", "torch")) else "tensorflow"


def label(method):
    """A method's name for tables.

    >>> label("sparse:0.001:auto+natural"), label("ddp:powersgd4")
    ('sparse 0.1 %, natural', 'DDP, PowerSGD rank 4')
    >>> label("buckets2:0.01:auto")
    'buckets2 1 %, coded'
    >>> label("auto:0.001"), label("torch_local")
    ('auto 0.1 %', 'local, PyTorch')
    """
    kind, *rest = method.split(":")
    if kind == "torch_local":
        return "local, PyTorch"
    if kind == "ddp":
        hook = "".join(rest)
        if hook.startswith("powersgd"):
            hook = f"PowerSGD rank {hook.removeprefix('powersgd')}"
        return f"DDP, {hook}" if hook else "DDP"
    if not rest:
        return kind
    name = f"{kind} {100 * float(rest[0]):g} %"
    if len(rest) > 1:
        name += f", {_CODES.get(rest[1], rest[1].removeprefix('auto+'))}"
    return name


def percentile(values, share):
    """The value below which a share of the others lies, by interpolation."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def make_record(turns, header_bytes):
    """Sums up the turns of one method in one network.

    Args:
        turns: List of turns, each a list of the workers' answers.
        header_bytes: Bytes of the headers of a packet.

    Returns:
        Dict. A step takes as long as it took the slowest worker; bytes and CPU
        time are those a step and worker.
    """
    seconds = [
        max(of_workers)
        for turn in turns
        for of_workers in zip(*(a["seconds"] for a in turn), strict=True)
    ]
    counted = sum(a["counted_steps"] for turn in turns for a in turn)
    num_bytes, num_packets, cpu_seconds = (
        sum(a[key] for turn in turns for a in turn) / counted
        for key in ("sent_bytes", "sent_packets", "cpu_seconds")
    )
    return {
        "rounds": len(turns),
        "steps": len(seconds),
        "milliseconds": 1e3 * statistics.median(seconds),
        "milliseconds_10_to_90_percent": [
            1e3 * percentile(seconds, share) for share in (0.1, 0.9)
        ],
        "cpu_milliseconds": 1e3 * cpu_seconds,
        "sent_bytes": num_bytes,
        "header_bytes": header_bytes * num_packets,
    }


def compare(records):
    """Adds to the records what follows from others of the same cell."""
    times = {
        (r["network"], r["size"], r["method"]): r["milliseconds"]
        for r in records
    }
    for r in records:
        cell = (r["network"], r["size"])
        dense = times.get((*cell, "dense"))
        local = times.get((*cell, LOCAL[kind_of(r["method"])]))
        r["speedup_over_dense"] = dense and dense / r["milliseconds"]
        r["exchange_share"] = local and 1 - local / r["milliseconds"]
        reported = r.get("reported_bytes")
        payload = r["sent_bytes"] - r["header_bytes"]
        r["counted_over_reported"] = reported and r["sent_bytes"] / reported
        r["payload_over_reported"] = reported and payload / reported


def text_table(records):
    """The records as lines to print."""
    lines = [
        f"{'network':9} {'size':>10} {'method':24} {'ms':>9} {'10-90 %':>17} "
        f"{'CPU ms':>7} {'speed-up':>8} {'exchange':>8} {'KB sent':>10} "
        f"{'/ report':>8}"
    ]
    for r in records:
        low, high = r["milliseconds_10_to_90_percent"]
        columns = [
            f"{r['cpu_milliseconds']:7.1f}",
            f"{r['speedup_over_dense'] or float('nan'):8.2f}",
            f"{100 * r['exchange_share']:7.0f}%"
            if r["exchange_share"] is not None
            else " " * 8,
            f"{r['sent_bytes'] / 1e3:10,.1f}",
            f"{r['counted_over_reported']:8.3f}"
            if r["counted_over_reported"]
            else "",
        ]
        name = label(r["method"])
        if r.get("chosen_exchange") and r["method"].startswith("auto"):
            name += f" ({r['chosen_exchange']})"
        lines.append(
            f"{r['network']:9} {r['size']:10,} {name:24} "
            f"{r['milliseconds']:9.1f} {f'{low:.1f}-{high:.1f}':>17} "
            + " ".join(columns)
        )
    return "\n".join(lines)


def markdown_table(summary):
    """The table for the documentation.

    Rows are methods, columns networks and sizes; cells are how many times
    faster a step is than `dense`. The first row has milliseconds.

    Args:
        summary: What `summary.json` holds.
    """
    cells = {
        (r["network"], r["size"], r["method"]): r for r in summary["results"]
    }
    columns = list(dict.fromkeys(cell[:2] for cell in cells))
    methods = list(dict.fromkeys(cell[2] for cell in cells))

    def row(name, text_of):
        texts = [text_of(cells, column) for column in columns]
        return f"| {name} | {' | '.join(texts)} |"

    def speedup_of(method):
        def text_of(cells, column):
            r = cells.get((*column, method))
            if r is None or r["speedup_over_dense"] is None:
                return "-"
            chosen = r.get("chosen_exchange")
            is_auto = method.startswith("auto")
            note = f" ({chosen})" if is_auto and chosen else ""
            return f"{r['speedup_over_dense']:.2f}{note}"

        return text_of

    def milliseconds(cells, column):
        r = cells.get((*column, "dense"))
        if r is None:
            return "-"
        value = r["milliseconds"]
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"

    headings = [f"{network} {_short(size)}" for network, size in columns]
    return "\n".join(
        [
            f"| | {' | '.join(headings)} |",
            f"| --- |{' ---: |' * len(columns)}",
            row("dense, milliseconds", milliseconds),
            *(row(label(m), speedup_of(m)) for m in methods if m != "dense"),
        ]
    )


def _short(size):
    """1000000 as `1M`."""
    for unit, name in ((10**6, "M"), (10**3, "K")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return str(size)


def plot(summary, path):
    """Draws the step times as bars, a panel for each network and size."""
    import matplotlib

    matplotlib.use("Agg")  # Writes files; needs no display.
    from matplotlib import pyplot as plt

    results = summary["results"]
    sizes = list(dict.fromkeys(r["size"] for r in results))
    networks = list(dict.fromkeys(r["network"] for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    figure, axes = plt.subplots(
        len(sizes),
        len(networks),
        figsize=(2 + 3 * len(networks), (1 + 0.25 * len(methods)) * len(sizes)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (i, size), (j, network) in (
        (row, column)
        for row in enumerate(sizes)
        for column in enumerate(networks)
    ):
        axis = axes[i, j]
        for r in results:
            if (r["size"], r["network"]) != (size, network):
                continue
            low, high = r["milliseconds_10_to_90_percent"]
            median = r["milliseconds"]
            axis.barh(
                methods.index(r["method"]),
                median,
                color="C0" if kind_of(r["method"]) == "tensorflow" else "C1",
                xerr=[[max(0, median - low)], [max(0, high - median)]],
            )
        axis.set_xscale("log")
        # Few enough that no label lies on another one.
        low, high = axis.get_xlim()
        ticks = [t for t in _TICKS if low <= t <= high]
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.set_title(f"{network}, {_short(size)} parameters", fontsize=10)
        axis.set_xlabel("milliseconds a step")
    axes[0, 0].set_yticks(range(len(methods)), [label(m) for m in methods])
    axes[0, 0].invert_yaxis()
    count = summary["config"]["num_workers"]
    figure.suptitle(
        f"{count} workers: median step, 10 to 90 % of steps "
        "(blue: TensorFlow, orange: PyTorch)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(markdown_table(json.load(file)))
