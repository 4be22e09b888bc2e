"""The examples that simulate workers, shortened."""

import json
import pathlib
import subprocess
import sys
import types

import example_utils
import keras
import linear_regression
import numpy as np
import reference
import toy_logistic

import tf_regtopk

EXAMPLES = pathlib.Path(example_utils.__file__).parent


def run_example(name, tmp_path, **flags):
    result = subprocess.run(
        [
            sys.executable,
            EXAMPLES / f"{name}.py",
            f"--output_dir={tmp_path}",
            *(f"--{flag}={value}" for flag, value in flags.items()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    return summary, result.stdout


def test_linear_regression_script(tmp_path):
    """Small enough to be quick, large enough to tell the methods apart."""
    summary, output = run_example(
        "linear_regression",
        tmp_path,
        num_workers=4,
        dimension=20,
        points_per_worker=200,
        rounds=700,
        learning_rate=0.05,
        density=0.6,
        indices="elias_fano",
        values="float32",
    )
    final = {
        name: method["final_log10_distance"]
        for name, method in summary["methods"].items()
    }
    assert list(final) == ["dense", "topk", "regtopk"]
    assert final["dense"] < -20
    assert final["regtopk"] < -15
    assert final["topk"] > -6
    assert summary["config"]["density"] == 0.6
    assert summary["config"]["num_workers"] == 4
    for name, value in final.items():
        assert f"{name:10} {value:8.2f}" in output


def test_methods_are_what_their_flags_say():
    args = types.SimpleNamespace(
        learning_rate=0.5,
        mu=2.0,
        denominator="current",
        indices="golomb",
        values="natural",
    )
    topk = tf_regtopk.TopK(0.25)
    accumulate = tf_regtopk.Accumulate()
    expected = {
        "topk": (topk, accumulate),
        "regtopk": (
            tf_regtopk.RegTopK(0.25, 2.0, denominator="current"),
            accumulate,
        ),
        "randomk": (tf_regtopk.RandomK(0.25), accumulate),
        "ef21": (topk, tf_regtopk.EF21()),
        "shift": (topk, tf_regtopk.LearnedShift()),
    }
    assert {"dense", *expected} == set(example_utils.METHODS)
    for method, (sparsifier, error_feedback) in expected.items():
        made = example_utils.make_optimizer(method, args, density=0.25)
        assert made.sparsifier == sparsifier
        assert made.error_feedback == error_feedback
        assert made.codec == tf_regtopk.Codec("golomb", "natural")
        assert float(made.learning_rate) == 0.5
    dense = example_utils.make_optimizer("dense", args, density=0.25)
    assert type(dense) is keras.optimizers.SGD


def test_linear_regression_follows_the_reference(mirrored):
    """Each replica gets its own worker's data, and takes the paper's steps."""
    keras.config.set_floatx("float64")
    # Keras rounds 1 / num_workers to float32, which is exact for 4.
    num_workers, dimension, rounds = 4, 7, 25
    problem = linear_regression.make_problem(num_workers, dimension, 11, 5)
    features, targets, optimum = problem
    distances = linear_regression.train(
        lambda: tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.05), tf_regtopk.RegTopK(0.4)
        ),
        mirrored(num_workers),
        problem,
        rounds,
        "test",
    )

    workers = reference.Workers("regtopk", num_workers, [dimension], 0.4)
    w = np.zeros(dimension)
    for distance in distances:
        residuals = features @ w - targets[..., 0]
        gradients = 2 * np.einsum("nij,ni->nj", features, residuals) / 11
        w = w - 0.05 * workers.step(gradients)
        np.testing.assert_allclose(
            distance, np.sum((w - optimum) ** 2), rtol=1e-9
        )


def test_linear_regression_problem():
    features, targets, optimum = linear_regression.make_problem(4, 5, 100, 0)
    assert features.shape == (4, 100, 5)
    assert targets.shape == (4, 100, 1)
    residuals = features @ optimum - targets[..., 0]
    gradient = np.einsum("nij,ni->j", features, residuals)
    np.testing.assert_allclose(gradient, np.zeros(5), atol=1e-10)
    again = linear_regression.make_problem(4, 5, 100, 0)
    np.testing.assert_array_equal(targets, again[1])
    other = linear_regression.make_problem(4, 5, 100, 1)
    assert np.any(targets != other[1])


def test_toy_logistic_script(tmp_path):
    summary, _ = run_example("toy_logistic", tmp_path)
    methods = summary["methods"]
    # Top-k stands still until the second entry's error is as large as the
    # first entry, a hundred rounds.
    assert methods["topk"]["rounds_without_progress"] == 100
    assert methods["dense"]["rounds_without_progress"] == 0
    assert methods["regtopk"]["rounds_without_progress"] <= 2
    dense, regtopk = (methods[m]["final_loss"] for m in ("dense", "regtopk"))
    np.testing.assert_allclose(regtopk, dense, rtol=0.05)


def test_toy_logistic_loss():
    np.testing.assert_allclose(
        toy_logistic.loss(np.array([[0.0], [1.0]])), np.log1p(np.exp(-1.0))
    )


def test_unknown_method():
    """Told before anything is trained."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / "toy_logistic.py", "--methods=dense,top"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode != 0
    assert "must be among dense, topk, regtopk, randomk" in (
        result.stdout + result.stderr
    )
