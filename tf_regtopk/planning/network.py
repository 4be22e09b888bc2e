r"""The seconds that gradients and entries take from worker to worker.

Each worker has a link, with both directions at once, to a switch that never
blocks. `tests/support/network_simulation.py` sends every packet instead.
"""

import dataclasses
import math

from tf_regtopk import validation
from tf_regtopk.planning import devices

# A message takes so many round trips, because TensorFlow's receivers ask for
# each message. A ring waits for one message after the other; the messages of an
# all-gather travel side by side.
RING_TRIPS = 1
GATHER_TRIPS = 1
# These are the bytes that a connection sends before it hears from the receiver,
# fitted to TensorFlow's all-reduces by 4 processes on 2 cores, see
# docs/benchmarks.md.
WINDOW_BYTES = 3e6


@dataclasses.dataclass(frozen=True)
class Link:
    """A link, with the same bandwidth in both directions at once.

    Args:
        bandwidth: Bytes per second.
        latency: Seconds, one way.
    """

    bandwidth: float
    latency: float

    def seconds(self, num_bytes: float, num_connections: int = 1) -> float:
        """Computes the seconds of messages sent at once, without latency.

        On a connection a window of W bytes follows the last window by a round
        trip or more, so that with c connections

            t = max(c b / bandwidth, 2 q latency + c (b - q W) / bandwidth)
            q = ceil(b / W) - 1

        Args:
            num_bytes: b, bytes of the message on each connection.
            num_connections: c.

        Returns:
            Seconds from the first byte to the last.
        """
        waits = max(0, math.ceil(num_bytes / WINDOW_BYTES) - 1)
        rest = num_bytes - waits * WINDOW_BYTES
        return max(
            num_connections * num_bytes / self.bandwidth,
            2 * waits * self.latency + num_connections * rest / self.bandwidth,
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """The links of workers, and of the devices inside a worker.

    Args:
        bandwidth: Bytes per second of a worker's link, in each direction.
        latency: Seconds from worker to worker, one way.
        local_bandwidth: Bytes per second of a device's link inside its worker,
            in each direction.
        local_latency: Seconds from device to device of a worker, one way.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a rate is not positive, or a time is negative.
    """

    bandwidth: float
    latency: float
    local_bandwidth: float = 12.5e9
    local_latency: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("bandwidth", "local_bandwidth"):
            check_rate(name, getattr(self, name))
        for name in ("latency", "local_latency"):
            check_time(name, getattr(self, name))

    @property
    def local(self) -> Link:
        """The `Link` of a device inside its worker."""
        return Link(self.local_bandwidth, self.local_latency)

    def link(self, device: devices.Device) -> Link:
        """Makes the `Link` of a worker whose memory moves the bytes as well."""
        moving = device.moved_bytes / device.memory_bandwidth
        seconds_a_byte = 1 / self.bandwidth + moving
        return Link(1 / seconds_a_byte, self.latency)


def ring_seconds(num_members: int, num_bytes: float, link: Link) -> float:
    """Seconds of a ring all-reduce.

        t = 2 (M - 1) (2 latency + s(bytes / M))

    where s is `link.seconds`: in each round every member passes one of M parts
    on. A ring through several devices of a worker is as fast as the worker's
    link, because the ring passes through that link.

    Args:
        num_members: M.
        num_bytes: Bytes of the gradient of each member, and of the sum.
        link: `Link` of each member.

    Returns:
        Seconds.

    Example:

    >>> round(ring_seconds(4, 4e5, Link(bandwidth=1e9, latency=0.005)), 6)
    0.0606
    """
    trips = 2 * RING_TRIPS * link.latency
    part = num_bytes / num_members
    return 2 * (num_members - 1) * (trips + link.seconds(part))


def gather_seconds(num_workers: int, num_bytes: float, link: Link) -> float:
    """Seconds of an all-gather in which workers send to each other directly.

        t = 2 latency + s(bytes, N - 1 connections)

    Args:
        num_workers: N.
        num_bytes: Bytes for each of the other workers.
        link: `Link` of each worker.

    Returns:
        Seconds.

    Example:

    >>> round(gather_seconds(4, 1e5, Link(bandwidth=1e9, latency=0.005)), 6)
    0.0103
    """
    trips = 2 * GATHER_TRIPS * link.latency
    return trips + link.seconds(num_bytes, num_workers - 1)


def ring_gather_seconds(
    num_members: int, num_bytes: float, link: Link
) -> float:
    """Seconds of an all-gather in which payloads go round, as NCCL's do.

        t = (M - 1) (2 latency + s(bytes))

    Args:
        num_members: M.
        num_bytes: Bytes of the payload of a member.
        link: `Link` of each worker, which the ring enters once.

    Returns:
        Seconds.

    Example:

    >>> link = Link(bandwidth=1e9, latency=0.005)
    >>> round(ring_gather_seconds(4, 1e5, link), 6)
    0.0303
    """
    trips = 2 * RING_TRIPS * link.latency
    return (num_members - 1) * (trips + link.seconds(num_bytes))


def check_rate(name: str, value: float) -> None:
    """Raises unless `value` is a rate."""
    validation.check_number(name, value, "a positive rate", lambda r: r > 0)


def check_time(name: str, value: float) -> None:
    """Raises unless `value` is a time, which may be 0."""
    validation.check_number(
        name, value, "a time of at least 0", lambda t: t >= 0
    )
