"""Shares of a machine: the addresses, cores and GPUs of each worker."""

from collections.abc import Sequence
import contextlib
import os
import pathlib
import re
import socket
from typing import TypeVar

_Item = TypeVar("_Item")


def free_addresses(count: int) -> list[str]:
    """Finds free addresses within this machine."""
    return [f"127.0.0.1:{port}" for port in free_ports(count, "127.0.0.1")]


def free_ports(count: int, host: str) -> list[int]:
    """Finds free ports of this machine. Another process may be quicker.

    Args:
        count: Number of ports.
        host: Address to listen at, "" for all of this machine.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]


def gpus() -> list[str]:
    """Returns the names of the GPUs of this process.

    Those of `CUDA_VISIBLE_DEVICES` where it is set, and else the numbers of
    NVIDIA's device files.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores a name that is no GPU, and all after it.
        is_none = [name in ("", "-1", "NoDevFiles") for name in names]
        return names[: is_none.index(True)] if any(is_none) else names
    files = pathlib.Path("/dev").glob("nvidia*")
    numbers = [re.fullmatch(r"nvidia(\d+)", file.name) for file in files]
    return [str(n) for n in sorted(int(m[1]) for m in numbers if m)]


def cores() -> list[int]:
    """Returns the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def split(items: Sequence[_Item], count: int) -> list[list[_Item]]:
    """Shares items out in order, as evenly as they divide.

    Example:

    >>> split("abcde", 2)
    [['a', 'b'], ['c', 'd', 'e']]
    """
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [list(items[cuts[i] : cuts[i + 1]]) for i in range(count)]
