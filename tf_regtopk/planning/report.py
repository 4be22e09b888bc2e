"""The texts of `python -m tf_regtopk.advise`: assumptions, tables, answers."""

from collections.abc import Sequence
import math
import textwrap

from tf_regtopk.planning import advice as advice_lib
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import quantities
from tf_regtopk.planning.cost_model import predict
from tf_regtopk.planning.job import Job
from tf_regtopk.planning.network import Network


def table(job: Job, network: Network) -> str:
    """Formats a table of the methods, with the limits up to which they win."""
    dense = crossover.fastest_dense(job, network)
    lines = [
        f"{'':16}{'step':>9}{'exchange':>10}{'processing':>12}{'sent':>9}"
        f"{'speed-up':>10}  beats dense up to"
    ]
    noun = _members(job)
    now = job_lib.members(job).workers
    for method in cost_model.methods(job):
        p = method.cost(job, network)
        line = (
            f"{method.name:16}{quantities.seconds(p.step_seconds):>9}"
            f"{quantities.seconds(p.exchange_seconds):>10}"
            f"{quantities.seconds(p.processing_seconds):>12}"
            f"{quantities.num_bytes(p.sent_bytes):>9}"
            f"{dense / p.step_seconds:>10.2f}"
        )
        if not method.is_dense:
            last = crossover.last_workers(method, job, network)
            density = crossover.last_density(method, job, network)
            is_later = p.step_seconds >= dense and last > now
            line += "  only with more, up to " if is_later else "  "
            limits = f"{_number(last)} {noun}, density {density:.3g}"
            line += limits if last or density else "never"
        lines.append(line)
    lines.append("")
    lines += [f"{m.name:16}  {m.meaning}" for m in cost_model.methods(job)]
    return "\n".join(lines)


def sweep(job: Job, network: Network) -> str:
    """Formats a table of the steps with 2, 4, ..., 4,096 workers."""
    most = crossover.with_members(job, 4096)
    names = [method.name for method in cost_model.methods(most)]
    lines = [
        _members(job) + "".join(f"{name:>17}" for name in names) + "  fastest"
    ]
    for number in (2**i for i in range(1, 13)):
        trial = crossover.with_members(job, number)
        steps = {n: p.step_seconds for n, p in predict(trial, network).items()}
        times = "".join(
            f"{quantities.seconds(steps[n]) if n in steps else '-':>17}"
            for n in names
        )
        fastest = min(steps, key=steps.__getitem__)
        lines.append(f"{number:7}{times}  {fastest}")
    return "\n".join(lines)


def takeover(job: Job, network: Network) -> str:
    """Explains in words which method takes over with more workers."""
    limits = []
    for method in cost_model.methods(job):
        if not method.is_dense and not method.has_owners:
            others = job_lib.members(job).workers - 1
            to_each = method.cost(job, network).sent_bytes / others
            in_bytes = math.floor(2 * job.gradient_bytes / to_each)
            in_time = crossover.last_workers(method, job, network)
            limits.append(f"{method.name} {_number(in_time)} ({in_bytes:,})")
    noun = _members(job)
    text = (
        f"With N {noun} each link passes the k entries of N - 1, or in a dense "
        "ring about two gradients whatever N is. So dense takes over where "
        "density * N * bits of an entry exceeds 64 in bytes alone; latency and "
        f"reading move that. The most {noun} with which a method beats dense, "
        f"and in bytes alone: {', '.join(limits)}."
    )
    if job.devices_per_worker > 1 and job.workers > 1:
        text += (
            " D devices of a worker send D payloads or more to each other "
            "worker, where hierarchical sends one: dense takes over from it "
            "last."
        )
    return text


def assumptions(job: Job, network: Network, remark: str = "") -> str:
    """Formats everything that the prediction rests on.

    Args:
        job: `Job`.
        network: `Network`.
        remark: The way in which the device was chosen.

    Returns:
        Lines of text.
    """
    device = job.device
    rows = [
        (
            "model",
            f"{quantities.count(job.parameters)} parameters, "
            f"{quantities.num_bytes(job.gradient_bytes)} of float32 gradients",
        ),
        (
            "step time",
            f"{quantities.seconds(job.step_seconds)} of computing, without "
            "exchange",
        ),
        (
            "workers",
            f"{job.workers} with {job.devices_per_worker} "
            f"device{'s' if job.devices_per_worker > 1 else ''} each",
        ),
        (
            "device",
            f"{device.name}, {quantities.byte_rate(device.memory_bandwidth)} "
            f"of memory ({device.source})",
        ),
    ]
    if remark:
        rows.append(("", remark))
    if job.workers == 1:
        rows.append(("network", "none: the devices of one host exchange"))
    else:
        link = network.link(device).bandwidth
        software = (
            "NCCL, which MultiWorkerMirroredStrategy has to be asked for"
            if device.is_accelerator
            else "TensorFlow over gRPC"
        )
        rows += [
            (
                "network",
                f"{quantities.bit_rate(network.bandwidth)} each way, "
                f"{quantities.seconds(network.latency)} one way; give what "
                "programs measure, which may be a third of the label",
            ),
            (
                "exchange",
                f"{software}, which moves {device.moved_bytes:g} bytes of "
                "memory for a byte sent: at most "
                f"{quantities.bit_rate(link)}",
            ),
        ]
    if job.devices_per_worker > 1:
        rows.append(
            (
                "inside",
                f"{quantities.bit_rate(network.local_bandwidth)} from device "
                "to device of a worker, "
                f"{quantities.seconds(network.local_latency)}",
            )
        )
    rows += [
        (
            "entries",
            f"density {job.density:g}, {job.num_selected:,} entries of "
            f"{job.values}",
        ),
        (
            "processing",
            "a sparse step starts in "
            f"{quantities.seconds(device.start_seconds)}; a pass over the "
            f"gradients takes {quantities.seconds(job.pass_seconds)}, and the "
            "number of passes is that of the CPUs of docs/benchmarks.md",
        ),
        (
            "overlap",
            f"{job.overlap:.0%} of a dense exchange hides behind the backward "
            "pass (TensorFlow's strategies exchange after it)",
        ),
    ]
    indent = 13 * " "
    return "\n".join(
        textwrap.fill(f"  {label:11}{value}", 80, subsequent_indent=indent)
        for label, value in rows
    )


def other_devices(job: Job, candidates: Sequence[tuple[Job, Network]]) -> str:
    """Tells in words whether other devices would lead to other advice."""
    names = advice_lib.by_device(candidates)
    if len(names) == 1:
        return (
            f"No device was named, and {job.device.name} is assumed. The "
            f"answer is the same with each of: {', '.join(*names.values())}."
        )
    answers = "; ".join(
        f"{answer}: {', '.join(found)}" for answer, found in names.items()
    )
    return (
        "THE ANSWER DEPENDS ON THE DEVICE, and none was named: "
        f"{job.device.name} is assumed above. By device, {answers}. Name yours "
        "by --device."
    )


def _members(job: Job) -> str:
    return "devices" if job.workers == 1 else "workers"


def _number(number: int) -> str:
    return f"{number:,}" if number < crossover.MAX_WORKERS else "any number of"
