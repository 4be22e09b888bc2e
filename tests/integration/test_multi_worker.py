"""Tests of `MultiWorkerMirroredStrategy` with two real processes."""

import multi_worker_launcher
import multi_worker_program
import numpy as np
import pytest

TIMEOUT = 300


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two workers found."""
    return multi_worker_launcher.run_workers(
        multi_worker_program.__file__,
        num_workers=2,
        directory=tmp_path_factory.mktemp("workers"),
        timeout=TIMEOUT,
    )


def test_there_are_two_replicas(results):
    assert [r["num_replicas"] for r in results] == [2, 2]


def test_workers_agree(results):
    for name in ("history", "evaluate", "predict", "weights"):
        assert results[0]["train"][name] == results[1]["train"][name]
    # Also in the norms of each replica, which `Monitor` gathers.
    history = results[0]["train"]["history"]
    assert history["sparse_density"] == [0.3, 0.1, 0.1]
    assert min(history["sparse_residual"]) > 0


def test_trains_as_two_replicas_in_one_process_do(results, mirrored):
    expected = multi_worker_program.train(mirrored(2))
    for i in range(2):
        # One replica for each worker.
        assert results[i]["train"]["batches"] == [expected["batches"][i]]
    assert expected["batches"][0] != expected["batches"][1]
    actual = results[0]["train"]
    close = dict(rtol=1e-5, atol=1e-6)
    for name in ("history", "evaluate"):
        assert set(actual[name]) == set(expected[name])
        for metric, value in expected[name].items():
            if metric == "sparse_exchange_seconds":
                assert min(actual[name][metric]) > 0
                continue
            np.testing.assert_allclose(
                actual[name][metric], value, **close, err_msg=metric
            )
    for n, value in expected["predict"].items():
        assert np.shape(value) == (n, 3)
        np.testing.assert_allclose(actual["predict"][str(n)], value, **close)
    for a, b in zip(actual["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(a, b, **close)
    # And it does learn.
    assert actual["history"]["loss"][-1] < 0.8 * actual["history"]["loss"][0]


def test_workers_gather_in_one_round(results):
    expected = [[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]]
    for result in results:
        assert result["gather"]["gathered"] == [expected] * 3
        assert result["gather"]["eager"] == expected
        # The public all-gather makes two, of which one tells the shapes.
        assert result["gather"]["collectives"] == ["CollectiveAllToAllV2"]


def test_last_validation_is_what_evaluate_gives(results):
    train = results[0]["train"]
    for metric, value in train["evaluate"].items():
        np.testing.assert_allclose(
            train["history"][f"val_{metric}"][-1], value, rtol=1e-6
        )


def test_inputs_of_any_dtype(results):
    for result in results:
        assert result["any_inputs"]["seen"] == [
            ["flag", "bool"],
            ["image", "uint8"],
            ["token", "int32"],
            ["word", "string"],
        ]
        assert result["any_inputs"]["history"]["loss"][0] > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        # In a structure every value keeps its dtype.
        "nested": [
            {"a": [["float32", 2.5]], "b": ["float32", [2.5, 5.5]]},
            ["int32", [1, 2]],
            ["uint8", [250, 3]],
        ],
        "nested axis 0": {"a": ["float32", 5.0], "b": ["float32", 16.0]},
        "scalar": ["float32", 2.5],
        "scalar sum": ["float32", 5.0],
        "scalar in graph": ["float32", 2.5],
        "scalar tensor": ["float32", 2.0],
        # As upstream.
        "float": ["float32", 4.0],
        "vector": ["float32", 4.0],
        "int32": ["float64", [1.5, 2.0]],
        # Not possible upstream.
        "uint8": ["uint8", [250, 3]],
        "uint32": ["uint32", [2**32 - 2]],
        "bool": ["bool", [False, True]],
    }.items(),
)
def test_reduce(results, name, expected):
    assert [r["reduce"][name] for r in results] == [expected, expected]


def test_mean_of_strings_is_local(results):
    assert [r["reduce"]["string"] for r in results] == ["a", "b"]


def test_workers_that_were_given_other_arguments_end_with_the_name(results):
    for worker, other in ((0, 1), (1, 0)):
        errors = results[worker]["build_differently"]
        assert {
            name: error.split("`")[1] for name, error in errors.items()
        } == {
            "codec": "codec",
            "sparsifier": "sparsifier",
            "density": "sparsifier",
            "error_feedback": "error_feedback",
            "inner_optimizer": "inner_optimizer",
            "telemetry": "telemetry",
        }
        assert (
            f"on worker {worker}, and something else on worker {other}"
            in errors["codec"]
        )
        assert ("bfloat16", "float16")[worker] in errors["codec"]


def test_upstream_still_fails(results):
    for result in results:
        error = result["upstream_error"]
        assert error is not None, (
            "`fit` works with the `reduce` of "
            "`tf.distribute.MultiWorkerMirroredStrategy` (keras#20585, "
            "tensorflow#72388). `tf_regtopk.MultiWorkerMirroredStrategy` can "
            "go for this version of Keras and TensorFlow."
        )
        assert "PerReplica" in error or "Invalid reduction dimension" in error
