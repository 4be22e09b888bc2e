r"""Predicts the seconds of a training step, for each method of exchange.

A step is computing, then processing (the work of a device on gradients and
entries), then the exchange. N is the number of workers, J of parameters, k of
selected entries, and F the time of a pass over the gradient.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Literal

from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.planning.job import Job
from tf_regtopk.sizes import exchanges
from tf_regtopk.sizes import payload as payload_sizes
from tf_regtopk.sizes import values as value_sizes

# These constants are fitted to docs/benchmarks.md, with 1M to 25.6M parameters
# at densities of 0.1 to 10 %. Their unit is F; constants named `ENTRY` have the
# unit F / J, for each entry.
SELECT_PASSES = 3.3  # A replica's step takes 2.2, flattening and splitting 1.1.
SELECT_ENTRY_PASSES = 50
WRITE_ENTRY_PASSES = {"int32": 2, "auto": 20}
READ_ENTRY_PASSES = {"int32": 4, "auto": 25}
SUM_PASSES = 0.5  # The sum is cleared.
SUM_ENTRY_PASSES = 16  # An entry costs a line of the cache.
SUM_MOST_PASSES = 0.4  # A payload costs no more than all lines of the cache.

# Entries go to owners as by `ReduceScatter()`.
OWNER_CAPACITY, OWNER_KEEP = 1.5, 1.0

# Only the backward pass hides an exchange, because the forward pass has no
# gradients. It computes two products where the forward pass computes one.
BACKWARD_SHARE = 2 / 3


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted seconds and bytes of a step.

    Args:
        step_seconds: Seconds of the whole step.
        exchange_seconds: Seconds of the exchange, hidden or not.
        processing_seconds: Seconds of selecting, writing, reading and adding.
        sent_bytes: Bytes that a worker sends to others; with one worker, that a
            device sends.
    """

    step_seconds: float
    exchange_seconds: float
    processing_seconds: float
    sent_bytes: float


def compression_seconds(
    job: Job, indices: Literal["int32", "auto"], num_payloads: int
) -> float:
    """Seconds that a device spends around a sparse exchange.

        t = start + F (select + k / J (select_entry + write) + sum
            + n (k / J read + min(k / J sum_entry, sum_most)))

    with the constants of this module, and the start of the device.

    Args:
        job: `Job`.
        indices: Name of the index codec.
        num_payloads: n, the number of payloads that a device reads and adds.

    Returns:
        Seconds.

    Example:

    >>> from tf_regtopk.planning import devices
    >>> cpu = devices.DEVICES["cpu"]
    >>> job = Job(parameters=10**7, workers=8, step_seconds=0.2, device=cpu)
    >>> round(compression_seconds(job, "auto", num_payloads=8), 3)
    0.025
    """
    density = job.num_selected / job.parameters
    write = SELECT_ENTRY_PASSES + WRITE_ENTRY_PASSES[indices]
    read = density * READ_ENTRY_PASSES[indices]
    add = min(density * SUM_ENTRY_PASSES, SUM_MOST_PASSES)
    passes = SELECT_PASSES + density * write + SUM_PASSES
    passes += num_payloads * (read + add)
    return job.device.start_seconds + passes * job.pass_seconds


@functools.lru_cache(maxsize=4096)
def _payload_bytes(
    indices: Literal["int32", "auto"],
    values: value_sizes.ValueCodecName,
    k: int,
    size: int,
) -> int:
    """Bytes of a payload that the library writes, without its header."""
    return 4 * payload_sizes.num_words(indices, values, k, size)


def _link(job: Job, network: network_lib.Network) -> network_lib.Link:
    """Returns the link that the exchange passes: of a worker, if several."""
    return network.local if job.workers == 1 else network.link(job.device)


def _dense(
    job: Job,
    network: network_lib.Network,
    num_members: int,
    local_seconds: float = 0.0,
    local_passes: float = 0.0,
) -> Prediction:
    link = _link(job, network)
    exchange = network_lib.ring_seconds(num_members, job.gradient_bytes, link)
    exchange += local_seconds
    sent_bytes = exchanges.ring(job.gradient_bytes, num_members)
    rest = (num_members - 1) / num_members
    processing = (rest + local_passes) * job.pass_seconds
    hidden = min(job.overlap * exchange, BACKWARD_SHARE * job.step_seconds)
    return Prediction(
        job.step_seconds + processing + exchange - hidden,
        exchange,
        processing,
        sent_bytes,
    )


def _dense_over_devices(job: Job, network: network_lib.Network) -> Prediction:
    return _dense(job, network, job.num_devices)


def _dense_by_worker(job: Job, network: network_lib.Network) -> Prediction:
    return _dense(job, network, job.workers, *_local_sum(job, network))


def _local_sum(job: Job, network: network_lib.Network) -> tuple[float, float]:
    """Returns seconds and passes of the sum over a worker's devices."""
    num_devices = job.devices_per_worker
    seconds = network_lib.ring_seconds(
        num_devices, job.gradient_bytes, network.local
    )
    return seconds, (num_devices - 1) / num_devices


def _sparse(
    job: Job,
    network: network_lib.Network,
    indices: Literal["int32", "auto"] = "auto",
    values: value_sizes.ValueCodecName | None = None,
) -> Prediction:
    payload = _payload_bytes(
        indices, values or job.values, job.num_selected, job.parameters
    )
    num_devices = job.num_devices
    link = _link(job, network)
    if job.device.is_accelerator:
        # The ring leaves each worker once.
        sent_bytes = exchanges.to_all(payload, num_devices)
        exchange = network_lib.ring_gather_seconds(num_devices, payload, link)
    else:
        num_workers = job_lib.members(job).workers
        sent_bytes = exchanges.to_all_by_worker(
            payload, num_devices, num_devices // num_workers
        )
        to_each = sent_bytes / (num_workers - 1)
        exchange = network_lib.gather_seconds(num_workers, to_each, link)
    processing = compression_seconds(job, indices, num_devices)
    return Prediction(
        job.step_seconds + processing + exchange,
        exchange,
        processing,
        sent_bytes,
    )


def _hierarchical(job: Job, network: network_lib.Network) -> Prediction:
    # A single device per worker is assumed, because `Hierarchical`
    # sends as many bytes as an all-gather of single devices.
    sparse = _sparse(dataclasses.replace(job, devices_per_worker=1), network)
    return _by_worker(job, network, sparse, [sparse.sent_bytes])


def _by_worker(
    job: Job,
    network: network_lib.Network,
    between: Prediction,
    received: Sequence[float],
) -> Prediction:
    """Adds what the devices of each worker do among themselves.

    Args:
        job: `Job`.
        network: `Network`.
        between: `Prediction` of workers with a single device each.
        received: Bytes that a worker receives, in each round.
    """
    local_seconds, local_passes = _local_sum(job, network)
    # What a worker has received is gathered once more, because each device
    # needs a copy.
    local_seconds += sum(
        network_lib.gather_seconds(2, num_bytes, network.local)
        for num_bytes in received
    )
    processing = local_passes * job.pass_seconds
    return Prediction(
        between.step_seconds + local_seconds + processing,
        between.exchange_seconds + local_seconds,
        between.processing_seconds + processing,
        between.sent_bytes,
    )


def _most_owned(num_devices: int) -> int:
    """The most parameters whose positions at the owners are int32."""
    return 2**31 - 2 * num_devices


def _owner_bytes(job: Job) -> tuple[int, int]:
    """Returns the bytes to an owner and from it, of a device for another."""
    numbers = payload_sizes.Scattered.of(
        # At the limit of int32 the last entries do not matter here.
        min(job.parameters, _most_owned(job.num_devices)),
        job.num_devices,
        job.num_selected,
        OWNER_CAPACITY,
        OWNER_KEEP,
    )
    there = 4 * numbers.num_words_to_owner(job.values)
    return there, 4 * numbers.num_words_to_all(job.values)


def _owners(job: Job, network: network_lib.Network) -> Prediction:
    num_devices, k = job.num_devices, job.num_selected
    there, back = _owner_bytes(job)
    num_workers = job_lib.members(job).workers
    own = num_devices // num_workers
    link = _link(job, network)
    sent_bytes = exchanges.to_owners_by_worker(
        num_devices * (there + back), num_devices, own
    )
    pairs = own**2  # Of devices of two workers.
    exchange = network_lib.gather_seconds(num_workers, pairs * there, link)
    if job.device.is_accelerator:
        exchange += network_lib.ring_gather_seconds(num_devices, back, link)
    else:
        exchange += network_lib.gather_seconds(num_workers, pairs * back, link)
    # An owner reads and adds about `capacity` k entries, selects among J / N
    # sums, and writes what it keeps.
    density = k / job.parameters
    read = density * READ_ENTRY_PASSES["auto"]
    add = min(density * SUM_ENTRY_PASSES, SUM_MOST_PASSES)
    passes = OWNER_CAPACITY * (
        density * WRITE_ENTRY_PASSES["auto"] + read + add
    )
    passes += (
        SELECT_PASSES + SUM_PASSES + density * SELECT_ENTRY_PASSES
    ) / num_devices
    processing = compression_seconds(job, "auto", num_payloads=0)
    processing += (passes + OWNER_KEEP * (read + add)) * job.pass_seconds
    return Prediction(
        job.step_seconds + processing + exchange,
        exchange,
        processing,
        sent_bytes,
    )


def _owners_by_worker(job: Job, network: network_lib.Network) -> Prediction:
    alone = dataclasses.replace(job, devices_per_worker=1)
    received = [(job.workers - 1) * number for number in _owner_bytes(alone)]
    return _by_worker(job, network, _owners(alone, network), received)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method to exchange gradients.

    Args:
        name: Name.
        meaning: Description of the method.
        cost: Function of `Job` and `Network` to `Prediction`.
        is_dense: True if whole gradients are sent.
        is_by_worker: True if a worker's devices first sum among themselves;
            such a method is not offered for workers with one device.
        has_owners: True if each entry is summed by one device or worker, so
            that each sends no more when there are more; such a method is
            offered from `LEAST_OWNERS` of them on.
    """

    name: str
    meaning: str
    cost: Callable[[Job, network_lib.Network], Prediction]
    is_dense: bool = False
    is_by_worker: bool = False
    has_owners: bool = False


# From so many owners on, entries that are summed by their owners are as
# accurate as those of an all-gather of the same bytes (docs/results.md).
LEAST_OWNERS = 32

# The methods are in order, the simplest to use first.
METHODS = (
    Method(
        "dense",
        "ring all-reduce of whole gradients over all devices",
        _dense_over_devices,
        is_dense=True,
    ),
    Method(
        "dense by worker",
        "all-reduce inside each worker, then over the workers",
        _dense_by_worker,
        is_dense=True,
        is_by_worker=True,
    ),
    Method(
        "coded",
        "all-gather of each device's entries, in the shortest index code",
        _sparse,
    ),
    Method(
        "natural",
        "all-gather of each device's entries, coded, with values of 8 bits",
        functools.partial(_sparse, values="natural"),
    ),
    Method(
        "sparse",
        "all-gather of each device's entries, as int32 and float32",
        functools.partial(_sparse, indices="int32", values="float32"),
    ),
    Method(
        "hierarchical",
        "all-reduce inside each worker, then all-gather of entries as coded",
        _hierarchical,
        is_by_worker=True,
    ),
    Method(
        "owners",
        "entries, coded, each summed by one device: ReduceScatter(), which "
        "needs a larger density, see docs/guides/method.md",
        _owners,
        has_owners=True,
    ),
    Method(
        "owners by worker",
        "all-reduce inside each worker, then entries each summed by one "
        "worker: ReduceScatter(hierarchical=True)",
        _owners_by_worker,
        is_by_worker=True,
        has_owners=True,
    ),
)


def _can_have_owners(job: Job, num_owners: int) -> bool:
    is_enough = num_owners >= LEAST_OWNERS
    return is_enough and job.parameters <= _most_owned(num_owners)


def methods(job: Job) -> list[Method]:
    """Selects the `METHODS` that a job can use."""
    several = job.devices_per_worker > 1 and job.workers > 1
    return [
        method
        for method in METHODS
        if (several or not method.is_by_worker)
        and (
            not method.has_owners
            or _can_have_owners(
                job, job.workers if method.is_by_worker else job.num_devices
            )
        )
    ]


def predict(job: Job, network: network_lib.Network) -> dict[str, Prediction]:
    """Predicts a step by each method.

    Args:
        job: `Job`.
        network: `network.Network`.

    Returns:
        Dict from the names of `methods(job)` to `Prediction`.

    Example:

    >>> from tf_regtopk.planning import devices
    >>> cpu = devices.DEVICES["cpu"]
    >>> job = Job(parameters=10**7, workers=4, step_seconds=0.2, device=cpu)
    >>> predictions = predict(job, network_lib.Network(12.5e6, latency=0.005))
    >>> round(predictions["dense"].exchange_seconds, 2)
    4.93
    >>> predictions["sparse"].sent_bytes
    240000
    """
    return {m.name: m.cost(job, network) for m in methods(job)}
