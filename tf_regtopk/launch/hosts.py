"""Hosts: which of them this machine is, and how others reach it."""

import contextlib
import ipaddress
import socket


def is_here(host: str) -> bool:
    """Returns whether a host is this machine.

    Args:
        host: Its name or address.
    """
    try:
        found = socket.getaddrinfo(host, 0, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as each:
            each.bind(address)
            return True
    return False


def check_is_reached(host: str) -> None:
    """Raises a `ValueError` if others cannot reach this machine by its name.

    Args:
        host: Name or address, of this machine or another.
    """
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return  # Somebody has meant this address.
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(
            f"The name of the rendezvous must be known. Received: {host}, for "
            f"which this machine finds no address ({error})"
        ) from error
    if ipaddress.ip_address(address).is_loopback and host != "localhost":
        raise ValueError(
            "The name of the rendezvous must lead to an address by which the "
            f"others reach it. Received: {host}, which is {address} here, as "
            "in many an /etc/hosts. Give the address in place of the name"
        )


def own_address(towards: tuple[str, int]) -> str:
    """Returns the address by which another machine reaches this one.

    Args:
        towards: Host and port of the other machine. Nothing is sent there.
    """
    [(family, _, _, _, address), *_] = socket.getaddrinfo(
        *towards, socket.AF_INET, socket.SOCK_DGRAM
    )
    with socket.socket(family, socket.SOCK_DGRAM) as each:
        each.connect(address)
        return str(each.getsockname()[0])
