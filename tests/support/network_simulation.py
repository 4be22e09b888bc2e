"""A network packet by packet, to compare `network.py` with.

Workers have a link each, both ways at once, to a switch that never blocks. A
link passes one packet after the other. A receiver first asks for its message,
and then `window` bytes of it may be on their way unanswered. Arrays over the
workers hold the times of one event of each.
"""

import collections

import numpy as np


class Simulation:
    """Links of N workers, and until when each is taken.

    Args:
        bandwidth: Bytes a second, scalar or `[N]` by receiver.
        latency: Seconds one way, scalar or `[N]` by receiver.
        num_workers: N.
        window: Bytes.
    """

    def __init__(self, bandwidth, latency, num_workers, window):
        self.bandwidth = np.broadcast_to(bandwidth, [num_workers])
        self.latency = np.broadcast_to(latency, [num_workers])
        self.window = window
        self.workers = np.arange(num_workers)
        # Until when each link's directions are taken.
        self.out = np.zeros(num_workers)
        self.into = np.zeros(num_workers)

    def send_packet(self, distance, num_bytes, earliest):
        """Worker n sends to n + distance; all arrays are by receiver."""
        senders = (self.workers - distance) % len(self.workers)
        seconds = num_bytes / self.bandwidth
        start = np.maximum(self.out[senders], earliest)
        self.out[senders] = start + seconds
        # The first byte may enter while the last has yet to leave.
        self.into = np.maximum(self.into, start + self.latency) + seconds
        return self.into

    def packets(self, num_bytes):
        """Sizes of a message's packets, and how many a window holds."""
        in_window = 32
        size = min(num_bytes, self.window / in_window)
        num_whole, rest = divmod(num_bytes, size)
        return [size] * int(num_whole) + [rest] * (rest > 0), in_window


def ring(num_bytes, num_workers, bandwidth, latency, window, trips=1):
    """Seconds of an all-reduce in 2 (N - 1) rounds around a ring.

    Args:
        num_bytes: Bytes that each worker has.
        num_workers: N.
        bandwidth: As of `Simulation`.
        latency: As of `Simulation`.
        window: As of `Simulation`.
        trips: Round trips from asking to answer.

    Returns:
        Seconds.
    """
    network = Simulation(bandwidth, latency, num_workers, window)
    packets, in_window = network.packets(num_bytes / num_workers)
    # When each worker has what it is to pass on.
    now = np.zeros(num_workers)
    for _ in range(2 * (num_workers - 1)):
        asked = now + (2 * trips - 1) * network.latency
        earliest = np.maximum(asked, np.roll(now, 1))
        answered = collections.deque(maxlen=in_window)
        for packet in packets:
            if len(answered) == in_window:
                earliest = np.maximum(earliest, answered[0])
            arrived = network.send_packet(1, packet, earliest)
            answered.append(arrived + network.latency)
        now = arrived.copy()
    return now.max()


def gather(num_bytes, num_workers, bandwidth, latency, window, trips=1):
    """Seconds until all have a message of all others, sent directly."""
    network = Simulation(bandwidth, latency, num_workers, window)
    packets, in_window = network.packets(num_bytes)
    distances = range(1, num_workers)
    answered = {d: collections.deque(maxlen=in_window) for d in distances}
    is_limited = len(packets) > in_window
    asked = (2 * trips - 1) * network.latency
    for packet in packets:
        # Connections take turns.
        for distance in distances:
            earliest = asked
            if len(answered[distance]) == in_window:
                earliest = np.maximum(asked, answered[distance][0])
            arrived = network.send_packet(distance, packet, earliest)
            if is_limited:
                answered[distance].append(arrived + network.latency)
    return network.into.max()
