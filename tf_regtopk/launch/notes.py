"""Notes that a worker leaves for the launcher, if one has started the worker.

They are files in a folder that the environment variable `VARIABLE` names.
"""

import contextlib
import os
import pathlib

VARIABLE = "TF_REGTOPK_LAUNCH_DIR"


def has_launcher() -> bool:
    """Returns whether a launcher has started this process."""
    return VARIABLE in os.environ


def write(name: str, text: str) -> None:
    """Leaves a note, over an earlier one of the name; nothing without launcher.

    Args:
        name: What the note is about.
        text: The note.
    """
    if directory := os.environ.get(VARIABLE):
        # A worker does not fail because a note cannot be left.
        with contextlib.suppress(OSError):
            pathlib.Path(directory, f"{name}-{os.getpid()}").write_text(text)


def remove(name: str) -> None:
    """Takes back the note that this process has left about something."""
    if directory := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            pathlib.Path(directory, f"{name}-{os.getpid()}").unlink()


def read(directory: str | os.PathLike[str], name: str) -> list[str]:
    """Returns the notes of all workers about something, each text once."""
    texts = set()
    for path in pathlib.Path(directory).glob(f"{name}-*"):
        with contextlib.suppress(FileNotFoundError):  # It was taken back.
            texts.add(path.read_text())
    return sorted(texts)


def count(directory: str | os.PathLike[str], name: str) -> int:
    """Returns the number of workers that have left a note about something."""
    return len(list(pathlib.Path(directory).glob(f"{name}-*")))
