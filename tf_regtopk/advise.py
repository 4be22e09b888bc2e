r"""Advises whether to compress, by the predicted seconds of a step.

    python -m tf_regtopk.advise --parameters=25.6e6 --workers=16 \
        --bandwidth=10Gbit --latency=50us --step_time=180ms

`cost_model.py` and `network.py` have the equations.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
import textwrap
from typing import Literal

from absl import app
from absl import flags

from tf_regtopk.codecs import value_codecs
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning.cost_model import Job
from tf_regtopk.planning.cost_model import predict
from tf_regtopk.planning.network import Network

# The simplest of the methods is recommended that are at most this much slower
# than the fastest, because a small gain is not worth a complex method.
TOLERANCE = 0.1

Kind = Literal["number", "rate", "time"]

_PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_RATES = {
    f"{prefix}{unit}{second}": factor * num_bytes
    for prefix, factor in _PREFIXES.items()
    for unit, num_bytes in (("B", 1), ("bit", 1 / 8))
    for second in ("", "/s")
}
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1}
_QUANTITIES = {
    "number": (_PREFIXES, "a positive number such as 25.6e6"),
    "rate": (_RATES, "a positive rate such as 10Gbit"),
    "time": (_TIMES, "a time of at least 0 such as 50us"),
}


# The flags that are quantities have a kind, a default and a meaning.
_FLAGS: dict[str, tuple[Kind, str | None, str]] = {
    "parameters": ("number", None, "Of the model."),
    "bandwidth": ("rate", None, "Of a worker's link, each way."),
    "latency": ("time", None, "From worker to worker, one way."),
    "step_time": ("time", None, "Of a step's computing, without exchange."),
    "memory_bandwidth": (
        "rate",
        "8GB",
        "Of a device: 12 bytes a parameter pass in F. The CPU of "
        "docs/benchmarks.md has 30GB, for all workers on it together; for a "
        "GPU set what its memory copies at, such as 1TB.",
    ),
    "local_bandwidth": ("rate", "100Gbit", "Between devices in a worker."),
    "local_latency": ("time", "10us", "Between devices in a worker, one way."),
}


def parse(name: str, text: str, kind: Kind) -> float:
    """Reads a quantity with its unit.

    Args:
        name: Name of the argument, for the error.
        text: Quantity such as `"25.6e6"`, `"10Gbit"`, `"1.25GB/s"` or `"0.2s"`.
        kind: `"number"`, `"rate"` or `"time"`.

    Returns:
        Float: a number, bytes per second, or seconds.

    Raises:
        ValueError: If the text is no quantity of that kind.

    Example:

    >>> parse("bandwidth", "10Gbit", "rate")
    1250000000.0
    """
    units, rule = _QUANTITIES[kind]
    match = re.fullmatch(
        r"((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?) ?([a-zA-Z/]*)", text.strip()
    )
    value = float(match[1]) * units.get(match[2], math.nan) if match else -1
    is_zero_time = value == 0 and kind == "time"
    if not (0 < value < math.inf or is_zero_time):
        raise ValueError(f"`{name}` must be {rule}. Received: {text}")
    return value


def recommend(job: Job, network: Network) -> tuple[cost_model.Method, str]:
    """Chooses the simplest method that is about as fast as the fastest.

    Args:
        job: `Job`.
        network: `Network`.

    Returns:
        `(method, text)`: an element of `cost_model.METHODS`, and the advice in
        words.
    """
    predictions = predict(job, network)
    fastest = min(p.step_seconds for p in predictions.values())
    method = min(
        (
            m
            for m in cost_model.methods(job)
            if predictions[m.name].step_seconds <= (1 + TOLERANCE) * fastest
        ),
        key=lambda method: not method.is_dense,
    )
    step_seconds = predictions[method.name].step_seconds
    step = f'"{method.name}" takes {_seconds(step_seconds)} a step'
    if method.is_dense:
        return method, (
            f"Do not compress: {step}, and nothing is more than "
            f"{TOLERANCE:.0%} faster."
        )
    dense = crossover.fastest_dense(job, network)
    return method, (
        f"Compress: {step} ({method.meaning}), dense {_seconds(dense)}, which "
        f"is {dense / step_seconds:.1f} times as long. Steps that send less "
        "are not worth as much: docs/results.md tells by how much."
    )


def table(job: Job, network: Network) -> str:
    """Formats a table of the methods, with the limits up to which they win."""
    dense = crossover.fastest_dense(job, network)
    lines = [
        f"{'':16}{'step':>9}{'exchange':>10}{'processing':>12}{'sent':>9}"
        f"{'speed-up':>10}  beats dense up to"
    ]
    for method in cost_model.methods(job):
        p = method.cost(job, network)
        line = (
            f"{method.name:16}{_seconds(p.step_seconds):>9}"
            f"{_seconds(p.exchange_seconds):>10}"
            f"{_seconds(p.processing_seconds):>12}{_bytes(p.sent_bytes):>9}"
            f"{dense / p.step_seconds:>10.2f}"
        )
        if not method.is_dense:
            workers = crossover.last_workers(method, job, network)
            density = crossover.last_density(method, job, network)
            is_later = p.step_seconds >= dense and workers > job.workers
            line += "  only with more, up to " if is_later else "  "
            line += f"{_workers(workers)} workers, density {density:.3g}"
        lines.append(line)
    lines.append("")
    lines += [f"{m.name:16}  {m.meaning}" for m in cost_model.methods(job)]
    return "\n".join(lines)


def sweep(job: Job, network: Network) -> str:
    """Formats a table of the steps with 2, 4, ..., 4,096 workers."""
    names = [method.name for method in cost_model.methods(job)]
    lines = ["workers" + "".join(f"{name:>17}" for name in names) + "  fastest"]
    for num_workers in (2**i for i in range(1, 13)):
        trial = dataclasses.replace(job, workers=num_workers)
        steps = {n: p.step_seconds for n, p in predict(trial, network).items()}
        times = "".join(f"{_seconds(steps[name]):>17}" for name in names)
        fastest = min(steps, key=steps.__getitem__)
        lines.append(f"{num_workers:7}{times}  {fastest}")
    return "\n".join(lines)


def takeover(job: Job, network: Network) -> str:
    """Explains in words which method takes over with more workers."""
    limits = []
    for method in cost_model.methods(job):
        if not method.is_dense:
            to_each = method.cost(job, network).sent_bytes / (job.workers - 1)
            in_bytes = math.floor(2 * job.gradient_bytes / to_each)
            in_time = crossover.last_workers(method, job, network)
            limits.append(f"{method.name} {_workers(in_time)} ({in_bytes:,})")
    text = (
        "With N workers each link passes the k entries of N - 1, or in a dense "
        "ring about two gradients whatever N is. So dense takes over where "
        "density * N * bits of an entry exceeds 64 in bytes alone; latency and "
        "reading move that. The most workers with which a method beats dense, "
        f"and in bytes alone: {', '.join(limits)}."
    )
    if job.devices_per_worker > 1:
        text += (
            " D devices of a worker send D * D payloads to each other worker, "
            "where hierarchical sends one: it takes over first, while it lasts."
        )
    return text


def _workers(number: int) -> str:
    return f"{number:,}" if number < crossover.MAX_WORKERS else "any number of"


def _seconds(seconds: float) -> str:
    return _scaled(seconds, ((1, "s"), (1e-3, "ms"), (1e-6, "us")))


def _bytes(num_bytes: float) -> str:
    return _scaled(
        num_bytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    )


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    factor, unit = next((u for u in units if number >= u[0]), units[-1])
    digits = max(0, 2 - math.floor(math.log10(max(number / factor, 1))))
    return f"{number / factor:.{digits}f} {unit}"


def define_flags() -> None:
    """Defines the command's flags."""
    for name, (_, default, meaning) in _FLAGS.items():
        flags.DEFINE_string(name, default, meaning, required=default is None)
    flags.DEFINE_integer(
        "workers",
        None,
        "Hosts with a link each, at least 2. With several --devices_per_worker "
        "all of a host's share its link; all-gathers other than hierarchical "
        "then have workers * devices_per_worker members.",
        required=True,
    )
    flags.DEFINE_integer("devices_per_worker", 1, "Devices in each host.")
    flags.DEFINE_float("density", 0.001, "Share of the entries that is sent.")
    flags.DEFINE_enum(
        "values", "float32", list(value_codecs.CODECS), "The code of values."
    )
    flags.DEFINE_float(
        "overlap", 0.0, "Share of a dense exchange that computing can hide."
    )
    flags.DEFINE_boolean("sweep", False, "Also for 2, 4, ..., 4096 workers.")


def _job_and_network(args: flags.FlagValues) -> tuple[Job, Network]:
    quantities = {
        name: parse(name, getattr(args, name), kind)
        for name, (kind, _, _) in _FLAGS.items()
    }
    job = Job(
        round(quantities["parameters"]),
        args.workers,
        quantities["step_time"],
        args.density,
        args.values,
        args.devices_per_worker,
        args.overlap,
        quantities["memory_bandwidth"],
    )
    network = Network(
        quantities["bandwidth"],
        quantities["latency"],
        quantities["local_bandwidth"],
        quantities["local_latency"],
    )
    return job, network


def main(argv: Sequence[str]) -> None:
    """Prints the tables and the advice."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    try:
        job, network = _job_and_network(flags.FLAGS)
    except (TypeError, ValueError) as error:
        raise app.UsageError(str(error)) from error
    print(table(job, network))
    if flags.FLAGS.sweep:
        print(f"\n{sweep(job, network)}")
    for text in (takeover(job, network), recommend(job, network)[1]):
        print(f"\n{textwrap.fill(text, 80)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
