"""What earlier versions have saved is loaded, and training goes on from it."""

import json

import keras
import numpy as np
import pytest
import saved_files
import tensorflow as tf

import tf_regtopk
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs

RUNS = [
    (version, run)
    for version in saved_files.versions()
    for run in saved_files.runs_of(version)
]


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    """Function from a version to its folder, and what its runs end with."""
    unpacked = {}

    def unpack(version):
        index = json.loads(
            (saved_files.DATA / version / "index.json").read_text()
        )
        if numbers_of(keras.__version__) < numbers_of(
            index["versions"]["keras"]
        ):
            pytest.skip("Keras does not read models of a newer Keras.")
        if version not in unpacked:
            folder = tmp_path_factory.mktemp("saved_files") / version
            unpacked[version] = folder, saved_files.unpack(version, folder)
        return unpacked[version]

    return unpack


def numbers_of(version):
    """The major and minor number of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


@pytest.fixture
def _eagerly():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def assert_as_expected(weights, expected):
    # Another processor may round otherwise.
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "version, run, way",
    [
        pytest.param(version, run, way, id=f"{version}, {run['name']}, {way}")
        for version, run in RUNS
        for way in run["ways"]
    ],
)
@pytest.mark.usefixtures("_eagerly")
def test_goes_on(version, run, way, unpack):
    """One process, also where several had saved."""
    folder, expected = unpack(version)
    weights = saved_files.go_on(
        saved_files.strategy_of(run["replicas"]),
        folder / run["name"],
        way,
        run,
    )
    assert_as_expected(weights, expected[run["name"]])


@pytest.mark.parametrize(
    "version, run",
    [
        pytest.param(version, run, id=f"{version}, {run['name']}")
        for version, run in RUNS
        if run["workers"]
    ],
)
def test_workers_go_on(version, run, unpack, tmp_path):
    folder, expected = unpack(version)
    weights = saved_files.launch(
        tmp_path, "go_on", folder / run["name"], json.dumps(run)
    )
    assert_as_expected(weights, expected[run["name"]])


def public_subclasses(base):
    return {
        value
        for value in vars(tf_regtopk).values()
        if isinstance(value, type) and issubclass(value, base)
    } - {base}


def test_every_part_is_saved():
    """The next version's files will hold what was added to this one."""
    runs = saved_files.RUNS.values()

    def used(argument):
        return [run[argument] for run in runs if argument in run]

    assert {type(sparsifier) for sparsifier in used("sparsifier")} == (
        public_subclasses(tf_regtopk.Sparsifier)
    )
    # `Accumulate` is the default.
    assert {type(rule) for rule in used("error_feedback")} == (
        public_subclasses(tf_regtopk.ErrorFeedback)
    )
    codecs = used("codec")
    assert {codec.indices for codec in codecs} >= set(index_codecs.CODECS)
    assert {codec.values for codec in codecs} >= set(value_codecs.CODECS)
    assert {run.get("scope", "global") for run in runs} == {
        "global",
        "per_variable",
    }
