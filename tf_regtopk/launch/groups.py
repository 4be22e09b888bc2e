"""Groups of workers: this machine's part of a training, and of the others'."""

import abc
import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import signal
from types import FrameType

from tf_regtopk.launch import cluster
from tf_regtopk.launch import hosts as hosts_lib
from tf_regtopk.launch import rendezvous
from tf_regtopk.launch import shares
from tf_regtopk.launch import terminal
from tf_regtopk.launch import worker as worker_lib

# Seconds before workers that know nothing of each other's launchers start
# again: longer than the heartbeat by which the others notice a lost worker.
_PAUSE_SECONDS = 15.0


class Group(abc.ABC):
    """The workers of a training, and which of them are of this machine.

    Args:
        args: The command's arguments.
    """

    # Number of restarts so far.
    num_restarts = 0
    # Seconds to wait before a restart.
    pause = 0.0
    # Whether another attempt has other ports.
    chooses_ports = True
    # Folder for its logs in that of all launchers, which machines may share.
    folder = ""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    # Whether machines or workers may be fewer, or more again.
    is_elastic = False

    @abc.abstractmethod
    def places(self) -> list[cluster.Place]:
        """Returns the places of this machine's workers in the next attempt.

        Raises:
            TimeoutError: If the workers of other machines do not come.
            ValueError: If the machine has no GPUs for them.
        """

    def failures_elsewhere(self) -> list[worker_lib.Failure]:
        """Returns the failures of other machines so far."""
        return []

    def settle(
        self, failures: Sequence[worker_lib.Failure]
    ) -> list[worker_lib.Failure]:
        """Returns the failures of all machines, when all attempts have ended.

        Args:
            failures: Those of this machine.
        """
        return list(failures)

    def reason_to_resize(self) -> str:
        """Says why the workers are to back up and start again, or nothing."""
        return ""

    def silence(self) -> list[str]:
        """Returns lines on who does not answer, where no launcher knows."""
        return []

    def leave(self, status: int) -> None:
        """Takes this machine's launcher out of the group.

        Args:
            status: The launcher's exit status.
        """
        del status  # No other launcher waits for this one.

    def _share_out(
        self, addresses: Sequence[str], first: int, count: int
    ) -> list[cluster.Place]:
        """Shares this machine out among its workers.

        Each has its GPUs and all cores, or, on the CPU, its share of the cores,
        because the threads of several workers on the same cores get in each
        other's way (`benchmarks/cluster/launcher_cores.py`).
        """
        gpus = shares.gpus() if self._args.device != "cpu" else []
        if (gpus or self._args.device == "gpu") and len(gpus) < count:
            raise ValueError(
                "`--workers` must be at most the number of GPUs, or "
                f"`--device=cpu` be given. Received: {count} workers, "
                f"{len(gpus)} GPUs"
            )
        cores = shares.cores()
        if gpus or self._args.cores == "all" or len(cores) < count:
            cores = []
        return [
            cluster.place_of(addresses, number, tuple(own), tuple(pinned))
            for number, own, pinned in zip(
                range(first, first + count),
                shares.split(gpus, count),
                shares.split(cores, count),
                strict=True,
            )
        ]


class OneMachine(Group):
    """All workers are of this machine.

    Args:
        args: The command's arguments. Where their number may change, those that
            are lost are left out, until SIGUSR1 asks for all.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self._least, self._most = args.workers
        self._count, self._is_asked_for_all = self._most, False
        self.is_elastic = self._least < self._most
        if self.is_elastic:
            signal.signal(signal.SIGUSR1, self._ask_for_all)

    def places(self) -> list[cluster.Place]:
        if self._is_asked_for_all:
            self._count, self._is_asked_for_all = self._most, False
        count = self._count = min(self._count, self._limit)
        return self._share_out(shares.free_addresses(count), 0, count)

    def settle(
        self, failures: Sequence[worker_lib.Failure]
    ) -> list[worker_lib.Failure]:
        # With fewer of them an error of the script would come again.
        num_lost = sum(not (f.is_own or f.is_asked) for f in failures)
        self._count = max(self._least, self._count - num_lost)
        return list(failures)

    def reason_to_resize(self) -> str:
        if self._is_asked_for_all and self._count < self._limit:
            return f"SIGUSR1 asks for {self._limit} workers"
        self._is_asked_for_all = False
        return ""

    @property
    def _limit(self) -> int:
        """The most workers that there can be, one for each GPU."""
        gpus = shares.gpus() if self._args.device != "cpu" else []
        if self.is_elastic and gpus:
            return max(self._least, min(self._most, len(gpus)))
        return self._most

    def _ask_for_all(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_asked_for_all = True


class Told(Group):
    """One worker, whose place somebody else has told, as a cluster does.

    Args:
        args: The command's arguments.
        place: The place.
    """

    pause = _PAUSE_SECONDS
    chooses_ports = False

    def __init__(self, args: argparse.Namespace, place: cluster.Place) -> None:
        super().__init__(args)
        self._place = place
        self.folder = place.name.replace(" ", "-")

    def places(self) -> list[cluster.Place]:
        if self._args.device == "cpu":
            return [dataclasses.replace(self._place, gpus=())]
        return [self._place]

    def silence(self) -> list[str]:
        return [cluster.silence(self._place.peers)]


class Gathered(Group):
    """Workers of several machines, whose launchers meet at a rendezvous.

    Args:
        args: The command's arguments.

    Raises:
        ValueError: If the arguments do not say what is needed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        hosts = _hosts(args)
        if hosts:
            board, port = next(iter(hosts)), args.rendezvous_port
        else:
            board, port = _board(args)
            self.is_elastic = args.nodes[0] < args.nodes[1]
        hosts_lib.check_is_reached(board)
        if hosts:
            self._host = args.host or _this_host(hosts)
            if self._host not in hosts:
                raise ValueError(
                    "`--host` must be one of the hosts. Received: "
                    f"{self._host}, and the hosts {', '.join(hosts)}"
                )
        else:
            self._host = args.host or hosts_lib.own_address((board, port))
        least, most = args.workers or (hosts.get(self._host, 1),) * 2
        if least < most:
            raise ValueError(
                "`--workers` must be one number where there are several "
                "machines, of which `--nodes=2:4` lets some come and go. "
                f"Received: --workers={least}:{most}"
            )
        self._count: int = most
        # Others do not wait for a machine that has no place for its workers.
        self._share_out([], 0, most)
        self.folder = self._host
        self.chooses_ports = not args.port
        self._member = rendezvous.Member(
            self._host,
            tuple(hosts) or args.nodes,
            (board, port),
            _secret(args),
            args.max_restarts,
        )

    def places(self) -> list[cluster.Place]:
        ports = (
            range(self._args.port, self._args.port + self._count)
            if self._args.port
            else shares.free_ports(self._count, host="")
        )
        meeting = self._member.meet(
            [f"{self._host}:{port}" for port in ports],
            self._args.start_timeout,
            self.num_restarts,
            on_wait=lambda: terminal.say(
                "The training has begun without this machine, and takes it in "
                "when there is a place and all have backed up."
            ),
        )
        self.num_restarts = meeting.num_restarts
        return self._share_out(meeting.addresses, meeting.first, self._count)

    def failures_elsewhere(self) -> list[worker_lib.Failure]:
        return self._member.failures_elsewhere()

    def reason_to_resize(self) -> str:
        newcomers = self._member.newcomers()
        return f"{', '.join(newcomers)} can take part" if newcomers else ""

    def settle(
        self, failures: Sequence[worker_lib.Failure]
    ) -> list[worker_lib.Failure]:
        return self._member.settle(failures)

    def leave(self, status: int) -> None:
        self._member.leave(status)


def group_of(args: argparse.Namespace) -> tuple[Group, str]:
    """Returns the group that the arguments or the environment tell.

    Args:
        args: The command's arguments.

    Returns:
        The group, and a line that says how it was found.

    Raises:
        ValueError: If nothing tells it, or what tells it makes no sense.
    """
    ways = [
        way is not None for way in (args.hosts, args.hostfile, args.rendezvous)
    ]
    if sum(ways) > 1 or (args.nodes and not args.rendezvous):
        raise ValueError(
            "One of `--hosts`, `--hostfile`, and `--rendezvous` with `--nodes` "
            "must say which machines there are. Received: "
            f"--hosts={args.hosts} --hostfile={args.hostfile} "
            f"--rendezvous={args.rendezvous} --nodes={args.nodes}"
        )
    if any(ways):
        return Gathered(args), ""
    if args.workers:
        return OneMachine(args), ""
    told = cluster.told_place(args.port)
    if told is None:
        raise ValueError(
            "The workers must be told: by `--workers` for this machine, by "
            "`--hosts`, `--hostfile` or `--rendezvous` for several, by the "
            "environment variable `TF_CONFIG`, or by the variables of a step "
            "of Slurm with more than one task. Received: none of these"
        )
    place, source = told
    return Told(args, place), (
        f"This is {place.name} of {len(place.addresses)}, by {source}."
    )


def _hosts(args: argparse.Namespace) -> dict[str, int]:
    """Returns the number of workers of each host that is listed."""
    text = args.hosts or ""
    if args.hostfile:
        lines = pathlib.Path(args.hostfile).read_text("utf-8").splitlines()
        text = ",".join(line.partition("#")[0] for line in lines)
    hosts = {}
    items = [item for item in re.split(r"[\s,]+", text) if item]
    if not items and not args.rendezvous:
        raise ValueError(
            "Hosts must be names, at least one. Received: none, by "
            f"--hosts={args.hosts} --hostfile={args.hostfile}"
        )
    for item in items:
        match = re.fullmatch(r"([^:\s]+)(?::([1-9]\d*))?", item)
        if not match or match[1] in hosts:
            raise ValueError(
                "Hosts must be names, each once, with a number of workers or "
                f"without, as host0,host1:2. Received: {text}"
            )
        hosts[match[1]] = int(match[2] or 1)
    return hosts


def _board(args: argparse.Namespace) -> tuple[str, int]:
    """Returns host and port of `--rendezvous`."""
    host, _, port = args.rendezvous.rpartition(":")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    if not host or not is_port or not args.nodes:
        raise ValueError(
            "`--rendezvous` must be a host and a port, as host0:29500, and "
            "`--nodes` the number of machines. Received: "
            f"{args.rendezvous}, --nodes={args.nodes}"
        )
    return host, int(port)


def _this_host(hosts: Sequence[str] | dict[str, int]) -> str:
    here = [host for host in hosts if hosts_lib.is_here(host)]
    if len(here) == 1:
        return here[0]
    raise ValueError(
        "`--host` must say which of the hosts this machine is. Received: none, "
        f"and of {', '.join(hosts)} the names of this machine are: "
        f"{', '.join(here) or 'none'}"
    )


def _secret(args: argparse.Namespace) -> bytes:
    if args.secret_file:
        secret = pathlib.Path(args.secret_file).read_bytes().strip()
    else:
        secret = os.environ.get(cluster.SECRET_VARIABLE, "").encode()
    if not secret:
        raise ValueError(
            "A secret must be given, by `--secret_file` or "
            f"`{cluster.SECRET_VARIABLE}`, the same on all machines. "
            "Received: none"
        )
    return secret
