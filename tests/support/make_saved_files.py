"""Saves small files by this version of the package, for later ones to load.

    python tests/support/make_saved_files.py

writes `tests/data/<version>/`; `test_saved_files.py` goes on from those of all
versions. On the machine that has written them, with the same TensorFlow, that
is to the bit:

    python tests/support/make_saved_files.py --check_exact
"""

import json
import pathlib
import tempfile
import zipfile

from absl import app
from absl import flags
import logical_devices  # noqa: F401  Makes the devices, so comes first.

# isort: split
import keras
import numpy as np
import saved_files
import tensorflow as tf

import tf_regtopk

flags.DEFINE_boolean(
    "check_exact", False, "Whether to write nothing, and to go on from all."
)


def save_all(directory, output_directory):
    """Saves all runs.

    Args:
        directory: Where to make a folder for each.
        output_directory: Where workers may write.

    Returns:
        `(runs, expected)`: what the index says, and the weights in the end.
    """
    runs, expected = [], {}

    def add(name, replicas, workers, run, weights):
        runs.append(
            {"name": name, "replicas": replicas, "workers": workers, **run}
        )
        expected[name] = weights

    for title, kwargs in saved_files.RUNS.items():
        for replicas in kwargs.get("replicas", (0, 2)):
            name = f"{title}, {replicas} replicas"
            strategy = saved_files.strategy_of(replicas)
            result = saved_files.save_run(strategy, directory / name, **kwargs)
            add(name, replicas, 0, *result)
    name = "2 workers"
    result = saved_files.launch(output_directory, "save", directory / name)
    add(name, 2, 2, result["run"], np.array(result["expected"], np.float32))
    return runs, expected


def write(target):
    """Saves all runs, and writes them to a new folder."""
    if target.exists():
        raise app.UsageError(
            "The files of a version must be written once, by that version. "
            f"Received: {target}, which exists"
        )
    with tempfile.TemporaryDirectory() as output_directory:
        output_directory = pathlib.Path(output_directory)
        directory = output_directory / "files"
        runs, expected = save_all(directory, output_directory)
        target.mkdir(parents=True)
        with zipfile.ZipFile(
            target / "files.zip", "w", zipfile.ZIP_DEFLATED
        ) as archive:
            for path in sorted(directory.rglob("*")):
                archive.write(path, path.relative_to(directory))
    np.savez_compressed(target / "expected.npz", **expected)
    index = {
        "versions": {
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "tf_regtopk": tf_regtopk.__version__,
        },
        "runs": runs,
    }
    (target / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def check_exact(directory):
    """Exits with an error unless training goes on to the bit."""
    failures = []
    for version in saved_files.versions():
        expected = saved_files.unpack(version, directory / version)
        for run in saved_files.runs_of(version):
            name = run["name"]
            folder = directory / version / name
            if run["workers"]:
                weights = saved_files.launch(
                    directory, "go_on", folder, json.dumps(run)
                )
                result = {saved_files.BACKUP: weights}
            else:
                strategy = saved_files.strategy_of(run["replicas"])
                result = {
                    way: saved_files.go_on(strategy, folder, way, run)
                    for way in run["ways"]
                }
            for way, weights in result.items():
                error = np.abs(weights - expected[name]).max()
                print(f"{version}: {name}, {way}: differs by {error}")
                if error:
                    failures.append((version, name, way))
    if failures:
        raise SystemExit(f"These differ: {failures}")


def main(_):
    tf.get_logger().setLevel("ERROR")
    tf.config.run_functions_eagerly(True)
    if flags.FLAGS.check_exact:
        with tempfile.TemporaryDirectory() as directory:
            check_exact(pathlib.Path(directory))
    else:
        write(saved_files.DATA / tf_regtopk.__version__)


if __name__ == "__main__":
    app.run(main)
