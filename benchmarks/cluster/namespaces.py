"""A small network of network namespaces, with links as slow as asked for.

Every worker has a namespace with `eth0`, a veth pair to a bridge in one more
namespace. Conditions, changed under the feet of running programs:

*   `unshaped`: the links as they are.
*   `100mbit`, `1gbit`: `tc` tbf at both ends of every link, so that each worker
    sends and receives at that rate.
*   `5ms`: every packet is delayed by so much, one way, at no limit of the rate;
    by `tc` netem where the kernel has it. Else a second network is made of TAP
    devices, `eth1`, whose frames `traffic.py` passes on with the delay,
    and a route sends the workers' traffic there. The devices take packets of up
    to 64 KiB that no network card has cut (TSO): few enough for Python.

Needs root, `ip` and `tc`, and nothing of Python's but its own library.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

from benchmarks.cluster import traffic

PREFIX = "regtopk"
_SUBNET = "10.77.0"
# Every packet's link, IP and TCP headers, with the usual options.
HEADER_BYTES = 66
# A bucket of 1.2 ms: 15 KB at 100 Mbit/s, 150 KB at 1 Gbit/s. The usual 256 KB
# would let sparse traffic through unshaped. With less at 1 Gbit/s the kernel
# wakes up too late to fill the link (15 KB: 82 %), and works more.
_BURST_SECONDS = 1.2e-3


# ----- Pure parts -----


def parse_condition(name):
    """`(bits per second or None, delay in seconds)` of a condition's name."""
    if name == "unshaped":
        return None, 0.0
    if match := re.fullmatch(r"(\d+)(mbit|gbit)", name):
        return int(match[1]) * {"mbit": 10**6, "gbit": 10**9}[match[2]], 0.0
    if match := re.fullmatch(r"(\d+)ms", name):
        return None, int(match[1]) / 1e3
    raise ValueError(
        "A network must be `unshaped`, a rate as `100mbit` or `1gbit`, or a "
        f"delay as `5ms`. Received: {name}"
    )


def burst_bytes(rate):
    """Size of the token bucket at so many bits per second."""
    return max(15_000, round(rate * _BURST_SECONDS / 8))


def parse_counters(text):
    """`(bytes, packets)` that all but loopback sent, by `/proc/net/dev`."""
    num_bytes = num_packets = 0
    for line in text.splitlines()[2:]:
        name, numbers = line.split(":")
        if name.strip() != "lo":
            numbers = numbers.split()
            num_bytes += int(numbers[8])
            num_packets += int(numbers[9])
    return num_bytes, num_packets


def sent_counters():
    """`parse_counters` for the namespace of this process."""
    return parse_counters(pathlib.Path("/proc/net/dev").read_text("utf-8"))


# ----- Namespaces -----


def why_not():
    """Why this machine cannot have such a network, or None."""
    if os.name != "posix" or os.geteuid():
        return "root is needed, to make network namespaces"
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"`{tool}` is needed (of iproute2)"
    name = f"{PREFIX}-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        _run(
            *("ip", "-n", name, "link", "add", "name", "veth0"),
            *("type", "veth", "peer", "name", "veth1"),
        )
        _run(
            *("tc", "-n", name, "qdisc", "replace", "dev", "veth0", "root"),
            *("tbf", "rate", "1gbit", "burst", "150kb", "latency", "50ms"),
        )
    except subprocess.CalledProcessError as e:
        return f"`{' '.join(e.cmd)}` fails: {e.stderr.strip()}"
    finally:
        _run("ip", "netns", "del", name, check=False)
    return None


def leftovers(pid):
    """Namespaces of the run of process `pid` that still exist.

    Every link of a run lies in one of them, and goes with it.
    """
    listed = _run("ip", "netns", "list", check=False).stdout
    return sorted(set(re.findall(rf"{PREFIX}-{pid}-\w+", listed)))


def children(pid):
    """Numbers of the processes that process `pid` has started, as strings."""
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text("utf-8").split()


def remove_rest():
    """Ends children of this process, and removes namespaces of its run.

    For what a signal leaves that comes while a process is being started: no
    one knows that process yet, so no clean-up of its own ends it.
    """
    pid = os.getpid()
    for child in map(int, children(pid)):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for name in leftovers(pid):
        _run("ip", "netns", "del", name, check=False)


class Network:
    """The namespaces of one run. A context manager, that removes them.

    Args:
        num_workers: Number of workers.
    """

    def __init__(self, num_workers):
        self._base = f"{PREFIX}-{os.getpid()}"
        self._hub = f"{self._base}-hub"
        self._workers = [f"{self._base}-w{i}" for i in range(num_workers)]
        self._switch = None
        self.addresses = [f"{_SUBNET}.{i + 1}" for i in range(num_workers)]

    def __enter__(self):
        try:
            self._create()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _create(self):
        for name in [self._hub, *self._workers]:
            _run("ip", "netns", "add", name)
            # Its own traffic is not to be counted.
            for scope in ("all", "default"):
                key = f"net.ipv6.conf.{scope}.disable_ipv6=1"
                self._in(name, "sysctl", "-qw", key, check=False)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        link = ("ip", "-n", self._hub, "link")
        _run(*link, "add", "name", "bridge0", "type", "bridge")
        _run(*link, "set", "bridge0", "type", "bridge", "forward_delay", "0")
        _run(*link, "set", "bridge0", "up")
        for i, name in enumerate(self._workers):
            _run(
                *(*link, "add", "name", f"port{i}", "type", "veth"),
                *("peer", "name", "eth0", "netns", name),
            )
            _run(*link, "set", f"port{i}", "master", "bridge0", "up")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            address = f"{self.addresses[i]}/24"
            _run("ip", "-n", name, "address", "add", address, "dev", "eth0")
            # Packets for the address of eth0 may come in at eth1.
            for scope in ("all", "default"):
                key = f"net.ipv4.conf.{scope}.rp_filter=0"
                self._in(name, "sysctl", "-qw", key, check=False)

    def close(self):
        """Ends what runs in the namespaces, and removes them."""
        self._stop_switch()
        for name in [*self._workers, self._hub]:
            pids = _run("ip", "netns", "pids", name, check=False).stdout.split()
            for pid in map(int, pids):
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            _run("ip", "netns", "del", name, check=False)

    def command(self, worker, *args):
        """The command line that runs `args` in a worker's namespace."""
        return ["ip", "netns", "exec", self._workers[worker], *args]

    def _in(self, name, *args, check=True):
        return _run("ip", "netns", "exec", name, *args, check=check)

    def _ends(self):
        """`(namespace, device)` of both ends of every link."""
        for i, name in enumerate(self._workers):
            yield name, "eth0"
            yield self._hub, f"port{i}"

    def change(self, condition):
        """Makes the network what a condition's name says.

        Returns:
            What makes it so: `"tbf"`, `"netem"`, `"switch"` or `"nothing"`.
        """
        rate, delay = parse_condition(condition)
        self._stop_switch()
        for namespace, device in self._ends():
            _run(
                *("tc", "-n", namespace, "qdisc", "del", "dev", device, "root"),
                check=False,
            )
        if rate:
            for namespace, device in self._ends():
                _run(
                    *("tc", "-n", namespace, "qdisc", "replace"),
                    *("dev", device, "root", "tbf", "rate", f"{rate}bit"),
                    *("burst", f"{burst_bytes(rate)}b", "latency", "50ms"),
                )
            return "tbf"
        if delay:
            if self._delay_by_netem(delay):
                return "netem"
            self._start_switch(delay)
            return "switch"
        return "nothing"

    def _delay_by_netem(self, delay):
        # At the sender's end only: each packet passes one of them.
        return all(
            _run(
                *("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root"),
                *("netem", "delay", f"{delay * 1e6:.0f}us", "limit", "100000"),
                check=False,
            ).returncode
            == 0
            for name in self._workers
        )

    def _start_switch(self, delay):
        count = len(self._workers)
        command = ["switch", str(delay), str(count)]
        self._switch = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self._hub,
                sys.executable,
                traffic.__file__,
            ]
            + command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._switch.stdout.readline()  # The devices are there.
        for i, name in enumerate(self._workers):
            link = ("ip", "-n", self._hub, "link", "set", f"tap{i}")
            _run(*link, "netns", name, "name", "eth1")
            _run(
                *("ip", "-n", name, "link", "set", "eth1"),
                # No frame is lost before the switch has read it.
                *(
                    "address",
                    traffic.mac_address(i),
                    "txqueuelen",
                    "10000",
                    "up",
                ),
            )
            # Nearer than the route of eth0, which is to a /24.
            _run(
                *("ip", "-n", name, "route", "add", f"{_SUBNET}.0/25"),
                *("dev", "eth1", "src", self.addresses[i]),
            )

    def _stop_switch(self):
        """Removes the delayed network; its routes go with its devices."""
        if self._switch is not None:
            switch, self._switch = self._switch, None
            with contextlib.suppress(subprocess.TimeoutExpired):
                switch.communicate(timeout=5)
            switch.kill()
            switch.wait()

    def switch_statistics(self):
        """What the switch has counted, or None where there is none."""
        if self._switch is None:
            return None
        self._switch.stdin.write("\n")
        self._switch.stdin.flush()
        return json.loads(self._switch.stdout.readline())

    def probe(self, seconds=1.5):
        """Measures the way from the first worker to the second.

        Returns:
            Dict: `bulk_bits_per_second`, payload of one TCP connection over
            `seconds` that begin a second after it did;
            `link_bits_per_second`, the same with the headers of full packets;
            `round_trip_milliseconds`, the median of 50 exchanges of 64 bytes.
        """
        server = subprocess.Popen(
            self.command(1, sys.executable, traffic.__file__, "probe_server"),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            server.stdout.readline()
            client = self.command(
                *(0, sys.executable, traffic.__file__, "probe_client"),
                *(self.addresses[1], str(seconds)),
            )
            return json.loads(_run(*client, timeout=seconds + 30).stdout)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def _run(*command, check=True, timeout=30):
    try:
        return subprocess.run(
            command,
            check=check,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.CalledProcessError as e:
        e.add_note(e.stderr)  # The message alone has the status only.
        raise
