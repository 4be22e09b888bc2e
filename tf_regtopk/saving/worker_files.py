"""Files of which each worker of a run writes its own, under one name.

A worker can read the state of its own replicas only, and must not wait for the
others to save it. So each saves to a path of its own, `worker_path(path)`; and
where another number of workers goes on, all files are read together.
"""

import contextlib
import contextvars
import glob
import io
import os
import re
import zipfile

import h5py
import tensorflow as tf

from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.saving import saved_state

# Keras tells files apart by these, so they stay at the end.
_SUFFIXES = (".weights.h5", ".h5", ".keras")
# By this name `tf.train.Checkpoint` knows the state of the wrapper.
CHECKPOINT_KEY = "_checkpointed_state"

_scope = contextvars.ContextVar("scope", default=None)


def worker_path(path, strategy):
    """This worker's own path, of those that all workers write for `path`.

    Args:
        path: Path of a file, a folder or a checkpoint, the same on every
            worker.
        strategy: The `tf.distribute.Strategy` that the model trains under.

    Returns:
        String: `path` itself if there is one worker only.

    Example:

    ```python
    model.save(tf_regtopk.worker_path("m.keras", strategy))
    # m.worker-0-of-2.keras and m.worker-1-of-2.keras
    ```
    """
    number, num_workers = strategy_lib.worker_number(strategy)
    return _path_of(path, number, num_workers)


def _path_of(path, number, num_workers):
    root, suffix = _split(path)
    if num_workers == 1:
        return root + suffix
    return f"{root}.worker-{number}-of-{num_workers}{suffix}"


def _split(path):
    path = os.fspath(path)
    suffix = next((s for s in _SUFFIXES if path.endswith(s)), "")
    return path[: len(path) - len(suffix)], suffix


def find_files(path, strategy):
    """The newest files that a run has saved for `path`, in the workers' order.

    Args:
        path: What was given to `worker_path` when they were saved.
        strategy: The `tf.distribute.Strategy` of the run that loads them.

    Returns:
        List of paths; the other workers' may lie on other machines if as many
        workers load them as have saved them. Empty if there are none, or not
        all.
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


def _numbers_of_workers(path):
    root, suffix = _split(path)
    # A checkpoint consists of several files of which this is one.
    pattern = f"{glob.escape(root)}.worker-0-of-*{suffix or '*'}"
    found = (re.search(r"\.worker-0-of-(\d+)", f) for f in glob.glob(pattern))
    return [int(match.group(1)) for match in found if match]


def _time_saved(path):
    for name in (path, f"{path}.index"):
        if os.path.exists(name):
            return os.stat(name).st_mtime_ns
    return None


@contextlib.contextmanager
def reading(files):
    """While it lasts, optimizers find other workers' state in `files`.

    Gives a list to which every `SavedState` that is loaded is added.
    """
    loaded = []
    token = _scope.set((files, loaded))
    try:
        yield loaded
    finally:
        _scope.reset(token)


def complete(saved, replicas, num_replicas):
    """`saved`, with what the other workers have saved if that is needed.

    Args:
        saved: `saved_state.SavedState` out of this worker's own file.
        replicas: The numbers of the replicas to load.
        num_replicas: Number of replicas in the run that loads.

    Returns:
        `saved_state.SavedState`.
    """
    files, loaded = _scope.get() or ((), [])
    loaded.append(saved)
    if files and saved_state.needs_others(saved, replicas, num_replicas):
        existing = [file for file in files if _time_saved(file) is not None]
        return saved_state.combine(
            saved, [s for file in existing for s in read_states(file)]
        )
    return saved


def read_states(path):
    """Every `SavedState` in what Keras or `tf.train.Checkpoint` has saved.

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
        saved_state.from_bytes(reader.get_tensor(key))
        for key in reader.get_variable_to_shape_map()
        if CHECKPOINT_KEY in key.split("/")
    ]


def _read_h5(file):
    states = []

    def visit(_, group):
        if isinstance(group, h5py.Group) and saved_state.is_saved_in(group):
            arrays = {name: group[name][()] for name in group}
            states.append(saved_state.from_arrays(arrays)[0])

    with h5py.File(file, "r") as h5_file:
        h5_file.visititems(visit)
    return states
