r"""How far the cost model of `tf_regtopk.advise` is from what was measured.

    python -m benchmarks.cluster.step
    python -m benchmarks.cluster.advise_validation

For each network, size and method of `step.py` that the model knows, it
predicts the time of a step from the time of one without any exchange and from
the network's own throughput and round trip, all of the same run.
"""

import json
import statistics

from absl import app
from absl import flags

from benchmarks.cluster import report
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import devices
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib

# Names of the model for the codecs of the benchmark.
_CODECS = {
    "int32+float32": "sparse",
    "auto": "coded",
    "auto+natural": "natural",
}


def define_flags():
    flags.DEFINE_string(
        "summary",
        "results/cluster/summary.json",
        "What `step.py` has written.",
    )
    flags.DEFINE_float(
        "memory_bandwidth",
        8e9,
        "Bytes a second of memory that a worker has for itself.",
    )


def predicted_seconds(record, local_seconds, network, num_workers, bandwidth):
    """What the model says of a record, None if it does not know the method.

    Args:
        record: Record of `step.py`.
        local_seconds: Of a step of all workers without any exchange.
        network: Measured throughput and round trip of the record's network.
        num_workers: Number of workers.
        bandwidth: Bytes a second of a worker's memory.

    Returns:
        Seconds of a step.
    """
    kind, *rest = record["method"].split(":")
    if kind not in ("dense", "sparse"):
        return None
    job = job_lib.Job(
        parameters=record["parameters"],
        workers=num_workers,
        step_seconds=local_seconds,
        device=devices.with_bandwidth(devices.DEVICES["cpu"], bandwidth),
        density=float(rest[0]) if rest else 0.001,
    )
    links = network_lib.Network(
        bandwidth=network["bulk_bits_per_second"] / 8,
        latency=network["round_trip_milliseconds"] / 2e3,
    )
    name = _CODECS[rest[1]] if rest else "dense"
    return cost_model.predict(job, links)[name].step_seconds


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    with open(args.summary, encoding="utf-8") as f:
        summary = json.load(f)
    records = summary["results"]
    local = {
        (r["network"], r["size"]): r["milliseconds"] / 1e3
        for r in records
        if r["method"] == "local"
    }
    print("| network | parameters | method | measured ms | predicted | error |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    errors = []
    for r in records:
        seconds = predicted_seconds(
            r,
            local[r["network"], r["size"]],
            summary["networks"][r["network"]],
            summary["config"]["num_workers"],
            args.memory_bandwidth,
        )
        if seconds is None:
            continue
        error = 1e3 * seconds / r["milliseconds"] - 1
        errors.append(abs(error))
        print(
            f"| {r['network']} | {r['parameters']:,} | "
            f"{report.label(r['method'])} | {r['milliseconds']:,.1f} "
            f"| {1e3 * seconds:,.1f} | {100 * error:+.0f} % |"
        )
    print(
        f"\nMedian error {100 * statistics.median(errors):.0f} %, the largest "
        f"{100 * max(errors):.0f} %, of {len(errors)} predictions."
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
