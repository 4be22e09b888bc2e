r"""Advises whether to compress, by the predicted seconds of a step.

    python -m tf_regtopk.advise --parameters=25.6e6 --workers=16 \
        --bandwidth=10Gbit --latency=50us --step_time=180ms --device=v100

Every assumption is a flag or is printed. `planning/cost_model.py` and
`planning/network.py` have the equations, `planning/devices.py` the devices.
"""

from collections.abc import Sequence
import dataclasses
import textwrap

from absl import app
from absl import flags

from tf_regtopk.planning import advice as advice_lib
from tf_regtopk.planning import devices
from tf_regtopk.planning import figure
from tf_regtopk.planning import quantities
from tf_regtopk.planning import report
from tf_regtopk.planning.job import Job
from tf_regtopk.planning.network import Network
from tf_regtopk.sizes import recommended
from tf_regtopk.sizes import values as value_sizes

# Without `--device` this one is assumed, and the others are tried as well.
ASSUMED_DEVICE = "a100"

# The flags that are quantities have a kind and a meaning.
_FLAGS: dict[str, tuple[quantities.Kind, str]] = {
    "parameters": ("number", "Of the model, such as 25.6e6, 25.6M or 1.5B."),
    "bandwidth": (
        "rate",
        "Of a worker's link, each way, as programs measure it (iperf3; busbw "
        "of NCCL's all_reduce_perf), such as 10Gbit or 1.25GB. Needed with "
        "several workers.",
    ),
    "latency": (
        "time",
        "From worker to worker, one way (half of what ping tells), such as "
        "50us. Needed with several workers.",
    ),
    "step_time": ("time", "Of a step's computing, without exchange: 180ms."),
    "memory_bandwidth": (
        "rate",
        "Of a device, as programs measure it, such as 1.7TB; by default that "
        "of --device.",
    ),
    "local_bandwidth": (
        "rate",
        "Between the devices of a worker, each way; by default that of "
        "--device.",
    ),
    "local_latency": (
        "time",
        "Between the devices of a worker, one way; by default 10us.",
    ),
}
_REQUIRED = ("parameters", "step_time")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A device and the way it was chosen, with the others that it could be."""

    device: devices.Device
    remark: str = ""
    others: tuple[devices.Device, ...] = ()


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command's flags."""
    for name, (_, meaning) in _FLAGS.items():
        flags.DEFINE_string(
            name, None, meaning, values, required=name in _REQUIRED
        )
    flags.DEFINE_integer(
        "workers",
        None,
        "Hosts with a link each. With several --devices_per_worker all of a "
        "host's share its link; all-gathers other than hierarchical then have "
        "workers * devices_per_worker members. 1 for a single host.",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_integer(
        "devices_per_worker", 1, "Devices in each host.", flag_values=values
    )
    flags.DEFINE_alias("devices", "devices_per_worker", flag_values=values)
    flags.DEFINE_enum(
        "device",
        None,
        list(devices.DEVICES),
        "Device that trains. Without it one is assumed, and the others are "
        "tried as well.",
        values,
    )
    flags.DEFINE_boolean(
        "measure",
        False,
        "Measures the memory of this machine's CPU, for --device=cpu.",
        values,
    )
    flags.DEFINE_float(
        "density",
        0.001,
        "Share of the entries that is sent.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "compression",
        None,
        "That of methods.recommended, by how many times a payload is smaller "
        "than the gradient; in place of --density and --values.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "values",
        "float32",
        list(value_sizes.CODES),
        "The code of values.",
        values,
    )
    flags.DEFINE_float(
        "overlap",
        0.0,
        "Share of a dense exchange that the backward pass can hide.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "sweep", False, "Also for 2, 4, ..., 4096 workers.", values
    )
    flags.DEFINE_string(
        "plot",
        None,
        "File for a picture of the step time, such as advise.png.",
        values,
    )


def _choose_device(
    name: str | None, memory_bandwidth: float | None, is_measured: bool
) -> _Choice:
    """Chooses the device by the flags."""
    if is_measured:
        if name not in (None, "cpu") or memory_bandwidth is not None:
            raise ValueError(
                "`measure` must be alone or with --device=cpu, because the "
                "memory of this machine's CPU is measured. Received: "
                f"device={name}, memory_bandwidth={memory_bandwidth}"
            )
        return _Choice(
            devices.with_bandwidth(
                devices.DEVICES["cpu"],
                devices.measure_memory_bandwidth(),
                "measured on this machine, for all workers on it together",
            )
        )
    known = devices.DEVICES
    if memory_bandwidth is None:
        if name is not None:
            return _Choice(known[name])
        return _Choice(
            known[ASSUMED_DEVICE],
            "This device is ASSUMED: name yours by --device.",
            tuple(known.values()),
        )
    if name is not None:
        return _Choice(devices.with_bandwidth(known[name], memory_bandwidth))
    cpu, gpu = (
        dataclasses.replace(
            devices.with_bandwidth(known[kind], memory_bandwidth), name=label
        )
        for kind, label in (("cpu", "a CPU"), (ASSUMED_DEVICE, "a GPU"))
    )
    # GPUs of data centres begin at the 300 GB/s of an L4.
    is_gpu = memory_bandwidth >= known["l4"].memory_bandwidth
    return _Choice(
        gpu if is_gpu else cpu,
        "ASSUMED to be one by its memory: name yours by --device.",
        (cpu, gpu),
    )


def _entries(
    args: flags.FlagValues,
) -> tuple[float, value_sizes.ValueCodecName]:
    """The density, and the code of values, by the flags."""
    if args.compression is None:
        return args.density, args.values
    for name in ("density", "values"):
        if args[name].present:
            raise ValueError(
                f"`{name}` must be left out with `compression`, because it "
                f"follows from that. Received: {name}={args[name].value}, "
                f"compression={args.compression:g}"
            )
    return recommended.density(args.compression), recommended.VALUES


def cases(
    args: flags.FlagValues,
) -> tuple[tuple[Job, Network], str, list[tuple[Job, Network]]]:
    """Reads the flags.

    Args:
        args: Values of the flags of `define_flags`.

    Returns:
        `((job, network), remark, others)`: the case, a remark on its device,
        and the cases of the devices that it could have as well.

    Raises:
        ValueError: If a flag is wrong or missing.
    """
    given = {
        name: quantities.parse(name, getattr(args, name), kind)
        for name, (kind, _) in _FLAGS.items()
        if getattr(args, name) is not None
    }
    for name, example in (("bandwidth", "10Gbit"), ("latency", "50us")):
        if args.workers == 1 and name in given:
            raise ValueError(
                f"`{name}` must be left out with one worker, because it is "
                "that between workers: that between the devices of one is "
                f"`local_{name}`. Received: {name}={getattr(args, name)}"
            )
        if args.workers != 1 and name not in given:
            raise ValueError(
                f"`{name}` must be given with several workers, such as "
                f"--{name}={example}. Received: workers={args.workers}"
            )
    density, code = _entries(args)
    choice = _choose_device(
        args.device, given.get("memory_bandwidth"), args.measure
    )

    def case(device: devices.Device) -> tuple[Job, Network]:
        job = Job(
            round(given["parameters"]),
            args.workers,
            given["step_time"],
            device,
            density,
            code,
            args.devices_per_worker,
            args.overlap,
        )
        local = given.get("local_bandwidth", device.local_bandwidth)
        local_latency = given.get("local_latency", 10e-6)
        network = Network(
            given.get("bandwidth", local),
            given.get("latency", local_latency),
            local,
            local_latency,
        )
        return job, network

    return case(choice.device), choice.remark, [case(d) for d in choice.others]


def main(argv: Sequence[str]) -> None:
    """Prints the assumptions, the tables and the advice."""
    args = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    try:
        (job, network), remark, others = cases(args)
    except (TypeError, ValueError) as error:
        raise app.UsageError(str(error)) from error
    print("The prediction rests on")
    print(f"{report.assumptions(job, network, remark)}\n")
    print(report.table(job, network))
    if args.sweep:
        print(f"\n{report.sweep(job, network)}")
        print(f"\n{textwrap.fill(report.takeover(job, network), 80)}")
    print(f"\n{advice_lib.changes(job, network)}")
    texts = [advice_lib.text(advice_lib.advise(job, network))]
    doubt = advice_lib.if_less_is_reached(job, network)
    if doubt:
        texts.append(doubt)
    if others:
        texts.append(report.other_devices(job, others))
    for text in texts:
        print(f"\n{textwrap.fill(text, 80)}")
    if args.plot:
        try:
            figure.save(args.plot, job, network)
        except ImportError as error:
            raise app.UsageError(str(error)) from error
        except (OSError, ValueError) as error:
            raise app.UsageError(
                "`--plot` must be a file that can be written, of a kind such "
                f"as .png. Received: plot={args.plot}: {error}"
            ) from error


if __name__ == "__main__":
    define_flags()
    app.run(main)
