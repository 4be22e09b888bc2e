"""The files to install and to publish are complete, and work elsewhere."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile

import paths
import pytest


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from the sdist."""
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-q", "-o"]
        + [directory, paths.ROOT],
        check=True,
        capture_output=True,
        timeout=300,
    )
    [sdist], [wheel] = directory.glob("*.tar.gz"), directory.glob("*.whl")
    return sdist, wheel


def tracked_files():
    """The repository's files, as git lists them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("Needs a git repository, to know which files are its own.")
    return {f for f in listed.stdout.split("\n") if f}


def test_the_sdist_is_the_repository(built):
    with tarfile.open(built[0]) as archive:
        members = {m.name.split("/", 1)[-1] for m in archive if m.isfile()}
    assert tracked_files() - members == {".gitignore"}
    assert not any(name.endswith(".pyc") for name in members)


def test_the_wheel_is_the_package(built):
    members = set(zipfile.ZipFile(built[1]).namelist())
    expected = {
        name
        for name in tracked_files()
        if name.startswith("tf_regtopk/") and name.endswith((".py", ".typed"))
    }
    assert {m for m in members if ".dist-info/" not in m} == expected


def test_the_metadata_stands_alone(built):
    """Without a link that leads nowhere outside of the repository."""
    with zipfile.ZipFile(built[1]) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    text = metadata.get_payload()
    assert "# tf_regtopk" in text and "SparsifiedOptimizer" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(t.startswith("https://") for t in targets)
    for field in (
        "Author",
        "Classifier",
        "Keywords",
        "License",
        "Project-URL",
        "Requires-Python",
        "Summary",
    ):
        assert metadata[field], field


def test_the_wheel_works_elsewhere(built, tmp_path):
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path)
    program = (
        "import keras, tf_regtopk, numpy as np; "
        f"assert tf_regtopk.__file__.startswith({str(tmp_path)!r}); "
        "v = keras.Variable(np.zeros(8)); "
        "tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(1.0), "
        "tf_regtopk.TopK(0.25)).apply([np.arange(8.0, dtype='f4')], [v]); "
        "assert np.count_nonzero(v) == 2"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        check=True,
        timeout=200,
        env={"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "-1"},
    )


def test_the_sdist_has_its_tests(built, tmp_path):
    """A quick part of them passes there."""
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    [root] = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0"]
        + ["tests/unit/kernels/test_hashing.py", "tests/unit/saving"],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=300,
        env={"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "-1"},
    )
