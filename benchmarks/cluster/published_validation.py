r"""How far the cost model is from dense steps that others have published.

    python -m benchmarks.cluster.published_validation

`published_steps.json` has the steps and their sources. It was committed before
the model predicted them, and no constant of the model is fitted to them.
"""

import json
import pathlib
import statistics

from absl import app

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import devices
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.planning import quantities

PUBLISHED = pathlib.Path(__file__).with_name("published_steps.json")


def predicted_seconds(step):
    """What the model says of a step of `published_steps.json`."""
    device = devices.DEVICES[step["device"]]
    job = job_lib.Job(
        # The model's gradients have 32 bits.
        parameters=round(step["parameters"] * step["gradient_bits"] / 32),
        workers=step["workers"],
        step_seconds=step["compute_milliseconds"] / 1e3,
        device=device,
        devices_per_worker=step["devices_per_worker"],
        overlap=step["overlap"],
    )
    bandwidth, latency = device.local_bandwidth, 10e-6
    if step["bandwidth"]:
        bandwidth = quantities.parse("bandwidth", step["bandwidth"], "rate")
        latency = quantities.parse("latency", step["latency"], "time")
    network = network_lib.Network(bandwidth, latency, device.local_bandwidth)
    return cost_model.predict(job, network)["dense"].step_seconds


def ratios(steps):
    """Predicted time / published time, of each step."""
    return [
        1e3 * predicted_seconds(step) / step["published_milliseconds"]
        for step in steps
    ]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    steps = json.loads(PUBLISHED.read_text("utf-8"))["steps"]
    print(
        "| step | compute ms | published | predicted | predicted / published |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    found = ratios(steps)
    for step, ratio in zip(steps, found, strict=True):
        published = step["published_milliseconds"]
        print(
            f"| {step['name']} | {step['compute_milliseconds']:,.0f} "
            f"| {published:,.0f} | {ratio * published:,.0f} | {ratio:.2f} |"
        )
    factors = [max(ratio, 1 / ratio) for ratio in found]
    near = sum(factor <= 1.5 for factor in factors)
    print(
        f"\nWithin a factor of 1.5: {near} of {len(found)}; the median factor "
        f"is {statistics.median(factors):.2f}, the largest {max(factors):.2f}."
    )


if __name__ == "__main__":
    app.run(main)
