"""The advice: whether to compress, and when the answer would be another."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Literal

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import devices
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.planning import quantities

# The simplest of the methods is recommended that are at most this much slower
# than the fastest, because a small gain is not worth a complex method.
TOLERANCE = 0.1
# Below this speed-up the advice has a condition, because sparse training often
# needs more steps (docs/results.md). The number is a judgement, no measurement.
CLEAR_SPEED_UP = 2
# From this rate on (40 Gbit/s) links are seldom filled by an all-reduce.
FAST_LINK = 5e9

Answer = Literal["do not compress", "compress only if", "compress"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """The advice for a job.

    Args:
        answer: `"do not compress"`, `"compress only if"` or `"compress"`.
        method: Method that is recommended.
        step_seconds: Seconds of a step by that method.
        dense_seconds: Seconds of a step by the fastest dense method.
        sparse_seconds: Seconds of a step by the fastest sparse method.
    """

    answer: Answer
    method: cost_model.Method
    step_seconds: float
    dense_seconds: float
    sparse_seconds: float


def advise(job: job_lib.Job, network: network_lib.Network) -> Advice:
    """Chooses the simplest method that is about as fast as the fastest.

    Args:
        job: `job_lib.Job`.
        network: `network.Network`.

    Returns:
        `Advice`.

    Example:

    >>> gpu = devices.DEVICES["a100"]
    >>> job = job_lib.Job(25_600_000, 16, 0.18, gpu)
    >>> slow, fast = (network_lib.Network(b, 5e-5) for b in (125e6, 50e9))
    >>> advise(job, slow).answer, advise(job, fast).answer
    ('compress', 'do not compress')
    """
    predictions = cost_model.predict(job, network)
    steps = {name: p.step_seconds for name, p in predictions.items()}
    fastest = min(steps.values())
    methods = cost_model.methods(job)
    dense = min(steps[m.name] for m in methods if m.is_dense)
    sparse = min(steps[m.name] for m in methods if not m.is_dense)
    # Dense methods come first.
    method = next(
        m for m in methods if steps[m.name] <= (1 + TOLERANCE) * fastest
    )
    taken = steps[method.name]
    answer: Answer = "compress"
    if method.is_dense:
        answer = "do not compress"
    elif dense < CLEAR_SPEED_UP * taken:
        answer = "compress only if"
    return Advice(answer, method, taken, dense, sparse)


def text(advice: Advice) -> str:
    """Writes the advice in words, with what it may cost in steps."""
    step = quantities.seconds(advice.step_seconds)
    speed_up = advice.dense_seconds / advice.step_seconds
    if advice.method.is_dense:
        gain = advice.dense_seconds / advice.sparse_seconds
        best = f"the fastest sparse method is {gain:.2f} times as fast"
        if gain < 1:
            best = "no sparse method is faster"
        return (
            f'Do not compress: "{advice.method.name}" takes {step} a step, and '
            f"{best}. Less than {1 + TOLERANCE:g} times is not worth a method "
            "that is less simple."
        )
    digits = 1 if speed_up >= CLEAR_SPEED_UP else 2
    steps = f"less than {speed_up:.{digits}f} times the steps of dense training"
    times = (
        f'"{advice.method.name}" takes {step} a step '
        f"({advice.method.meaning}), dense "
        f"{quantities.seconds(advice.dense_seconds)}"
    )
    worth = (
        "Sparse steps are often worth less: docs/results.md shows by how much "
        "accuracy trailed after equally many steps."
    )
    if advice.answer == "compress":
        return (
            f"Compress: {times}, which is {speed_up:.1f} times as long. This "
            f"pays if your training then needs {steps} for the same accuracy. "
            f"{worth}"
        )
    return (
        f"Compress only if your training then needs {steps} for the same "
        f"accuracy, which is a narrow margin: {times}. {worth}"
    )


def if_less_is_reached(job: job_lib.Job, network: network_lib.Network) -> str:
    """Tells in words whether a nominal bandwidth may mislead.

    Args:
        job: `job_lib.Job`.
        network: `network.Network`.

    Returns:
        Sentences, or `""` if the answer is the same with the share that
        all-reduces reached.
    """
    is_slow = network.bandwidth < FAST_LINK
    if job.workers == 1 or not job.device.is_accelerator or is_slow:
        return ""
    reached = network.bandwidth / 3
    less = advise(job, dataclasses.replace(network, bandwidth=reached)).answer
    if less == advise(job, network).answer:
        return ""
    return (
        "Is the bandwidth measured? All-reduces reached a third of a nominal "
        "100 Gbit/s elsewhere (docs/benchmarks.md). With a third of yours, "
        f"{quantities.bit_rate(reached)}, the answer is: {less}. "
        "all_reduce_perf of NCCL's tests prints what is reached (busbw)."
    )


@dataclasses.dataclass(frozen=True)
class _Input:
    """An input that is varied: its name, value, range, and how to write it."""

    name: str
    value: float
    low: float
    high: float
    write: Callable[[float], str]
    replaced: Callable[[float], tuple[job_lib.Job, network_lib.Network]]


def _inputs(
    job: job_lib.Job, network: network_lib.Network
) -> tuple[_Input, ...]:
    is_one = job.workers == 1
    bandwidth = "local_bandwidth" if is_one else "bandwidth"
    latency = "local_latency" if is_one else "latency"

    def replaced_network(
        name: str,
    ) -> Callable[[float], tuple[job_lib.Job, network_lib.Network]]:
        return lambda v: (job, dataclasses.replace(network, **{name: v}))

    return (
        _Input(
            bandwidth,
            getattr(network, bandwidth),
            125e3,  # 1 Mbit/s.
            125e12,  # 1,000 Tbit/s.
            quantities.bit_rate,
            replaced_network(bandwidth),
        ),
        _Input(
            latency,
            max(getattr(network, latency), 1e-7),
            1e-7,
            1.0,
            quantities.seconds,
            replaced_network(latency),
        ),
        _Input(
            "devices_per_worker" if is_one else "workers",
            job_lib.members(job).workers,
            2,
            2**16,
            lambda v: f"{round(v):,}",
            lambda v: (crossover.with_members(job, round(v)), network),
        ),
        _Input(
            "step_time",
            max(job.step_seconds, 1e-6),
            1e-6,
            1e4,
            quantities.seconds,
            lambda v: (dataclasses.replace(job, step_seconds=v), network),
        ),
        _Input(
            "memory_bandwidth",
            job.device.memory_bandwidth,
            1e9,
            1e14,
            quantities.byte_rate,
            lambda v: (
                dataclasses.replace(
                    job, device=devices.with_bandwidth(job.device, v)
                ),
                network,
            ),
        ),
        _Input(
            "density",
            job.density,
            1e-6,
            0.5,
            lambda v: f"{v:.3g}",
            lambda v: (dataclasses.replace(job, density=v), network),
        ),
    )


def changes(job: job_lib.Job, network: network_lib.Network) -> str:
    """Formats where each input, alone, would change the answer."""
    lines = ["The answer would be another with one of these instead:"]
    same = []
    for varied in _inputs(job, network):

        def answer(value: float, varied: _Input = varied) -> Answer:
            return advise(*varied.replaced(value)).answer

        found = crossover.nearest_changes(
            answer,
            varied.value,
            min(varied.low, varied.value),
            max(varied.high, varied.value),
        )
        parts = [
            f"{side} {varied.write(change[0])}: {change[1]}"
            for side, change in zip(("below", "above"), found, strict=True)
            if change
        ]
        if parts:
            lines.append(f"  {varied.name:18} {'; '.join(parts)}")
        else:
            same.append(varied.name)
    overlap = dataclasses.replace(job, overlap=1.0)
    answer_now = advise(job, network).answer
    hidden = advise(overlap, network).answer
    if hidden != answer_now:
        lines.append(
            f"  {'overlap':18} 1, all that the backward pass can hide: {hidden}"
        )
    else:
        same.append("overlap")
    if len(lines) == 1:
        lines = []
    if same:
        lines.append(f"No likely value of these does so: {', '.join(same)}.")
    return "\n".join(lines)


def by_device(
    candidates: Sequence[tuple[job_lib.Job, network_lib.Network]],
) -> dict[Answer, list[str]]:
    """Returns the names of the jobs' devices, by the answer for the job."""
    names: dict[Answer, list[str]] = {}
    for job, network in candidates:
        answer = advise(job, network).answer
        names.setdefault(answer, []).append(job.device.name)
    return names
