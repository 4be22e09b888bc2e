"""The devices that `advise` knows, by the speed of their memory."""

import concurrent.futures
import dataclasses
import os
import statistics
import time

import numpy as np

from tf_regtopk import validation

# Programs reach this share of a data sheet's bandwidth, because an H200 copied
# at 3.9 to 4.1 of its 4.8 TB/s (docs/benchmarks.md).
REACHED_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and how its workers exchange.

    Args:
        name: Name.
        memory_bandwidth: Bytes per second that programs move in its memory.
        local_bandwidth: Bytes per second to another device of the same worker,
            in each direction.
        is_accelerator: True for GPUs, whose strategy exchanges by NCCL; False
            for CPUs, between which TensorFlow exchanges over gRPC.
        source: Origin of the bandwidths, in words.

    Raises:
        TypeError: If a bandwidth is not a number.
        ValueError: If a bandwidth is not positive.
    """

    name: str
    memory_bandwidth: float
    local_bandwidth: float
    is_accelerator: bool
    source: str

    def __post_init__(self) -> None:
        for name in ("memory_bandwidth", "local_bandwidth"):
            validation.check_number(
                name, getattr(self, name), "a positive rate", lambda r: r > 0
            )

    @property
    def moved_bytes(self) -> float:
        """Bytes that memory moves for a byte that a worker sends.

        gRPC copies and encodes: the number is fitted to TensorFlow's
        all-reduces by 4 processes on 2 cores, see docs/benchmarks.md. NCCL
        reads the received part and the device's own, and writes their sum; the
        network's card reads and writes once each.
        """
        return 5 if self.is_accelerator else 34

    @property
    def start_seconds(self) -> float:
        """Seconds in which the programs of a sparse step start.

        On CPUs the other workers wake in this time as well; it was measured
        with two workers on a core and a small model, whose step is no longer.
        On an H200 the kernels of a step start in 0.2 ms (the part of the times
        in docs/benchmarks.md that does not grow with the model). The rest is
        an allowance for TensorFlow, which was not measured there.
        """
        return 1e-3 if self.is_accelerator else 8e-3


def _gpu(name: str, memory: float, local: float, link: str) -> Device:
    """Makes a GPU from GB/s of its data sheet: of memory; of links, one way."""
    return Device(
        name,
        REACHED_SHARE * 1e9 * memory,
        REACHED_SHARE * 1e9 * local,
        True,
        f"{REACHED_SHARE:.0%} of the data sheet's {memory:g} GB/s, and of "
        f"{local:g} GB/s by {link} one way",
    )


# The numbers are those of NVIDIA's data sheets "Tesla P100", "Tesla V100 GPU
# accelerator" (SXM2), "A100 80GB" (SXM), "H100" (SXM), "H200", "HGX B200" (one
# GPU), "T4", "A10", "L4", "L40S", and of the specifications of the GeForce RTX
# 3090 and 4090. Data sheets give links in both directions together; the half is
# one way. Other models of a name, such as the A100 with PCIe, may be slower.
DEVICES = {
    device.name: device
    for device in (
        Device(
            "cpu",
            30e9,
            12.5e9,
            False,
            "the two cores of docs/benchmarks.md; --measure takes this "
            "machine's own",
        ),
        _gpu("t4", 320, 16, "PCIe"),
        _gpu("l4", 300, 32, "PCIe"),
        _gpu("a10", 600, 32, "PCIe"),
        _gpu("l40s", 864, 32, "PCIe"),
        _gpu("rtx3090", 936, 32, "PCIe"),
        _gpu("rtx4090", 1008, 32, "PCIe"),
        _gpu("p100", 732, 80, "NVLink"),
        _gpu("v100", 900, 150, "NVLink"),
        _gpu("a100", 2039, 300, "NVLink"),
        _gpu("h100", 3350, 450, "NVLink"),
        _gpu("h200", 4800, 450, "NVLink"),
        _gpu("b200", 8000, 900, "NVLink"),
    )
}


def with_bandwidth(
    device: Device, memory_bandwidth: float, source: str = "as given"
) -> Device:
    """Returns the device with another bandwidth of its memory.

    Args:
        device: `Device`.
        memory_bandwidth: Bytes per second.
        source: Origin of the bandwidth, in words.

    Returns:
        `Device`.

    Example:

    >>> with_bandwidth(DEVICES["cpu"], 8e9).memory_bandwidth
    8000000000.0
    """
    return dataclasses.replace(
        device, memory_bandwidth=memory_bandwidth, source=source
    )


def measure_memory_bandwidth(
    num_floats: int = 2**25, num_rounds: int = 7
) -> float:
    """Measures the bytes per second that this machine's memory moves.

    All cores of this process add two vectors into a third, which is the pass F
    of docs/benchmarks.md.

    Args:
        num_floats: Length of the vectors, far longer than caches.
        num_rounds: Number of additions, of which the median counts.

    Returns:
        Bytes per second.
    """
    num_threads = os.cpu_count() or 1
    # Every page is written once before, because the first touch maps it.
    vectors = [
        np.array_split(np.full(num_floats, 1.0, np.float32), num_threads)
        for _ in range(3)
    ]

    def add(i: int) -> None:
        np.add(vectors[0][i], vectors[1][i], out=vectors[2][i])

    seconds = []
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for _ in range(num_rounds):
            begin = time.perf_counter()
            list(pool.map(add, range(num_threads)))
            seconds.append(time.perf_counter() - begin)
    return 12 * num_floats / statistics.median(seconds)
