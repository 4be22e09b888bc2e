"""What runs in the namespaces beside the workers: a slow switch, and a probe.

`switch` passes frames on between TAP devices, each after a delay. The two ends
of the probe measure the way between two namespaces with plain sockets.
"""

import collections
import contextlib
import fcntl
import json
import os
import select
import socket
import statistics
import struct
import sys
import time

_PORT = 5201


# ----- The switch -----


def mac_address(number):
    """The address of a worker's device: its last byte is the number."""
    return f"02:00:00:00:00:{number:02x}"


def open_tap(name):
    """Makes a TAP device that hands over and takes whole TSO packets."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR: 10 bytes before each frame say how
    # the next card would have to cut it, and pass through unread.
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))
    fcntl.ioctl(tap, 0x400454D0, 0x07)  # Checksums, TSO for IPv4 and IPv6.
    return tap


def switch(delay, count):
    """Passes frames on between TAP devices, each after `delay` seconds.

    Ends when standard input does; answers each line of it with statistics.
    """
    with contextlib.suppress(PermissionError):
        os.nice(-15)  # A late switch would be a longer delay.
    taps = [open_tap(f"tap{i}") for i in range(count)]
    print("ready", flush=True)
    waiting = collections.deque()  # Of one delay, so first in, first out.
    frames = num_bytes = lost = 0
    latest = 0.0
    while True:
        wait = None
        if waiting:
            wait = max(0.0, waiting[0][0] - time.monotonic())
        readable = select.select([sys.stdin, *taps], [], [], wait)[0]
        for tap in readable:
            if tap is sys.stdin:
                if not os.read(0, 1):
                    return
                counts = {
                    "frames": frames,
                    "bytes": num_bytes,
                    "lost_frames": lost,
                    "latest_milliseconds": 1e3 * latest,
                }
                print(json.dumps(counts), flush=True)
                continue
            for _ in range(32):
                try:
                    frame = os.read(tap, 1 << 17)
                except OSError:  # Nothing more, or not up yet.
                    break
                waiting.append((time.monotonic() + delay, tap, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            due, source, frame = waiting.popleft()
            latest = max(latest, now - due)
            # Behind the 10 bytes; broadcasts have the lowest bit set.
            if frame[10] & 1:
                targets = [tap for tap in taps if tap != source]
            else:
                targets = taps[frame[15] : frame[15] + 1]
            for target in targets:
                try:
                    os.write(target, frame)
                except OSError:
                    lost += 1
            frames += 1
            num_bytes += len(frame) - 10


# ----- The probe -----


def probe_server():
    """Echoes what arrives on one connection; reads a second one to its end."""
    with socket.create_server(("", _PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(64):
            connection.sendall(data)
        connection, _ = server.accept()
        seconds = struct.unpack("d", connection.recv(8))[0]
        start, total, buffer = None, 0, bytearray(1 << 20)
        begin = time.perf_counter()
        while True:
            total += connection.recv_into(buffer)
            now = time.perf_counter()
            if start is None and now - begin > 1:
                start, total = now, 0
            elif start is not None and now - start > seconds:
                break
        connection.sendall(struct.pack("d", 8 * total / (now - start)))
        # The client sends until it has the answer. To close before would
        # reset the connection, because what has arrived was not read.
        while connection.recv_into(buffer):
            pass


def probe_client(address, seconds):
    """Talks to `probe_server`, and returns what `Network.probe` does."""
    times = []
    with socket.create_connection((address, _PORT), 10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(55):
            start = time.perf_counter()
            connection.sendall(bytes(64))
            missing = 64
            while missing:
                missing -= len(connection.recv(missing))
            times.append(time.perf_counter() - start)
    with socket.create_connection((address, _PORT), 10) as connection:
        connection.sendall(struct.pack("d", seconds))
        connection.setblocking(False)
        data = memoryview(bytes(1 << 20))
        while True:
            readable, writable, _ = select.select(
                [connection], [connection], [], 10
            )
            if readable or not writable:
                break
            with contextlib.suppress(BlockingIOError):
                connection.send(data)
        connection.setblocking(True)
        rate = struct.unpack("d", connection.recv(8))[0]
    # A full packet of 1,514 bytes has 1,448 of payload.
    return {
        "bulk_bits_per_second": rate,
        "link_bits_per_second": rate * 1514 / 1448,
        "round_trip_milliseconds": 1e3 * statistics.median(times[5:]),
    }


if __name__ == "__main__":
    if sys.argv[1] == "switch":
        switch(float(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "probe_server":
        probe_server()
    else:
        print(json.dumps(probe_client(sys.argv[2], float(sys.argv[3]))))
