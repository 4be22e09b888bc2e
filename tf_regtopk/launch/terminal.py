"""The terminal: words of the launcher, and output of the workers."""

from collections.abc import Callable
import sys

from tf_regtopk.launch import cluster


def say(text: str) -> None:
    """Tells something of the launcher itself."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def shower(show: str, place: cluster.Place) -> Callable[[bytes], None]:
    """Returns the function that writes a worker's output to the terminal.

    Args:
        show: Whose output is shown: "chief", "all" or "none".
        place: The worker's `cluster.Place`.
    """
    if show == "none" or (show == "chief" and place.number > 0):
        return lambda piece: None
    if show == "chief":
        return _write
    rest = b""

    def show_lines(piece: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            _write(f"[{place.name}] ".encode() + line + b"\n")

    return show_lines


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
