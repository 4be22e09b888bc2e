"""Files that each worker of a run writes on its own, under one name.

A worker can read only the state of its own replicas, and must not wait for the
other workers to save theirs. So each worker saves to its own path,
`worker_path(path)`; if another number of workers resumes, all files are read
together.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
import glob
import io
import os
import re
from typing import BinaryIO
import zipfile

import h5py
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.log import logger
from tf_regtopk.saving import resuming
from tf_regtopk.saving import saved_state

# These suffixes stay at the end, because Keras tells files apart by them.
_SUFFIXES = (".weights.h5", ".h5", ".keras")

# The files of all workers, and the list of what has been loaded.
_scope: contextvars.ContextVar[
    tuple[Sequence[str], list[saved_state.SavedState]] | None
] = contextvars.ContextVar("scope", default=None)


class _Told:
    """Signs that the user knows that each worker has to save."""

    path_was_given = warned = False


def worker_path(
    path: str | os.PathLike[str], strategy: tf.distribute.Strategy
) -> str:
    """Returns the path at which this worker saves its part of `path`.

    Args:
        path: Path of a file, a folder or a checkpoint, the same on every
            worker.
        strategy: The `tf.distribute.Strategy` that the model trains under.

    Returns:
        String: `path` itself if there is only one worker.

    Example:

    ```python
    model.save(tf_regtopk.worker_path("m.keras", strategy))
    # m.worker-0-of-2.keras and m.worker-1-of-2.keras
    ```
    """
    number, num_workers = strategy_lib.worker_number(strategy)
    _Told.path_was_given = True
    return _path_of(path, number, num_workers)


def warn_if_alone(saved: saved_state.SavedState) -> None:
    """Warns once if a file holds the errors of some replicas, with no others.

    Nobody who has called `worker_path` needs the warning.

    Args:
        saved: `saved_state.SavedState` that this worker is saving.
    """
    is_part = len(saved.replicas) < saved.num_replicas
    if is_part and not (_Told.path_was_given or _Told.warned):
        _Told.warned = True
        logger.warning(
            "This worker saves the residual errors of its own replicas, %s of "
            "%d. That is enough for inference. To resume without loss save on "
            "every worker, to `tf_regtopk.worker_path(path, strategy)`, or "
            "train with `tf_regtopk.Backup`.",
            sorted(saved.replicas),
            saved.num_replicas,
        )


def _path_of(
    path: str | os.PathLike[str], number: int, num_workers: int
) -> str:
    root, suffix = _split(path)
    if num_workers == 1:
        return root + suffix
    return f"{root}.worker-{number}-of-{num_workers}{suffix}"


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    path = os.fspath(path)
    suffix = next((s for s in _SUFFIXES if path.endswith(s)), "")
    return path[: len(path) - len(suffix)], suffix


def find_files(
    path: str | os.PathLike[str], strategy: tf.distribute.Strategy
) -> list[str]:
    """Finds the newest files that a run has saved for `path`.

    Args:
        path: Path that was given to `worker_path` when the files were saved.
        strategy: The `tf.distribute.Strategy` of the run that loads the files.

    Returns:
        List of paths in the order of the workers' ranks, empty if files are
        missing. If the number of workers is unchanged, the files of the other
        workers may lie on other machines.
    """
    number, num_workers = strategy_lib.worker_number(strategy)
    runs = []
    for count in {1, num_workers, *_numbers_of_workers(path)}:
        files = [_path_of(path, i, count) for i in range(count)]
        times = [_time_saved(file) for file in files]
        if None not in times or (
            count == num_workers and times[number] is not None
        ):
            runs.append((max(filter(None, times)), files))
    return max(runs)[1] if runs else []


def _numbers_of_workers(path: str | os.PathLike[str]) -> list[int]:
    root, suffix = _split(path)
    # The pattern ends with `*` because a checkpoint has several files.
    pattern = f"{glob.escape(root)}.worker-0-of-*{suffix or '*'}"
    found = (re.search(r"\.worker-0-of-(\d+)", f) for f in glob.glob(pattern))
    return [int(match.group(1)) for match in found if match]


def _time_saved(path: str) -> int | None:
    for name in (path, f"{path}.index"):
        if os.path.exists(name):
            return os.stat(name).st_mtime_ns
    return None


@contextlib.contextmanager
def reading(files: Sequence[str]) -> Iterator[list[saved_state.SavedState]]:
    """Lets optimizers find the state of other workers in `files`.

    Yields:
        List to which every `SavedState` that is loaded is added.
    """
    loaded: list[saved_state.SavedState] = []
    token = _scope.set((files, loaded))
    try:
        yield loaded
    finally:
        _scope.reset(token)


def complete(
    saved: saved_state.SavedState, replicas: Sequence[int], num_replicas: int
) -> saved_state.SavedState:
    """Adds the state of the other workers to `saved`, if it is needed.

    Args:
        saved: `saved_state.SavedState` out of this worker's own file.
        replicas: Ranks of the replicas to load.
        num_replicas: Number of replicas in the run that loads.

    Returns:
        `saved_state.SavedState`.
    """
    files, loaded = _scope.get() or ((), [])
    loaded.append(saved)
    if files and resuming.needs_others(saved, replicas, num_replicas):
        existing = [file for file in files if _time_saved(file) is not None]
        return resuming.combine(
            saved, [s for file in existing for s in read_states(file)]
        )
    return saved


def read_states(path: str) -> list[saved_state.SavedState]:
    """Reads every `SavedState` that Keras or `tf.train.Checkpoint` has saved.

    Args:
        path: `.keras` or `.weights.h5` file, prefix of a checkpoint, or folder
            of a `tf.train.CheckpointManager` or a
            `keras.callbacks.BackupAndRestore`, of which the latest counts.

    Returns:
        List of `saved_state.SavedState`.
    """
    if os.path.isdir(path):
        latest = tf.train.latest_checkpoint(path)
        path = latest or os.path.join(path, "latest.weights.h5")
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            return _read_h5(io.BytesIO(archive.read("model.weights.h5")))
    if path.endswith(".h5"):
        return _read_h5(path)
    reader = tf.train.load_checkpoint(path)
    return [
        saved_state.from_bytes(reader.get_tensor(key))[0]
        for key in reader.get_variable_to_shape_map()
        if set(keras_internals.CHECKPOINT_KEYS) & set(key.split("/"))
    ]


def _read_h5(file: str | BinaryIO) -> list[saved_state.SavedState]:
    states = []

    def visit(_: str, group: h5py.Group | h5py.Dataset) -> None:
        if isinstance(group, h5py.Group) and saved_state.is_saved_in(group):
            arrays = {name: group[name][()] for name in group}
            states.append(saved_state.from_arrays(arrays)[0])

    with h5py.File(file, "r") as h5_file:
        h5_file.visititems(visit)
    return states
