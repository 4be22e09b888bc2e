"""The benchmarks for GPUs run, on CPUs; what they measure is not tested."""

import json
import pathlib
import sys

import fork_server
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_step  # noqa: E402
import gpu_utils  # noqa: E402


def run(benchmark, output_dir, *args):
    """The results, and what was printed."""
    args = [*args, "--device_type=CPU", f"--output_dir={output_dir}"]
    result = fork_server.run_one(BENCHMARKS / benchmark, args)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((output_dir / "summary.json").read_text("utf-8"))
    assert not results["failures"]
    return results, result.stdout


def test_update(tmp_path):
    results, printed = run(
        "gpu_step.py",
        tmp_path,
        "--sizes=20001",
        "--densities=0.01",
        "--methods=RegTopK,Keras SGD,tf.math.top_k",
        "--rounds=2",
        "--warm_up=1",
        "--steps=1",
        "--budget_seconds=300",
    )
    assert results["left"] == []
    assert {(r["replicas"], r["method"]) for r in results["results"]} == {
        (replicas, method)
        for replicas in (1, 2)
        for method in ("x + 1", "RegTopK", "Keras SGD", "tf.math.top_k")
    }
    for r in results["results"]:
        assert r["milliseconds"] > 0
        low, high = r["passes_10_to_90_percent"]
        assert low <= r["passes"] <= high
        assert (r["method"] != "x + 1") or r["passes"] == pytest.approx(1)
        assert r["rounds"] == 2
        assert r["setting"] == (
            "1 CPU" if r["replicas"] == 1 else "2 parts of one CPU, RING"
        )
        assert gpu_step.line(r) in printed


def test_update_without_time(tmp_path):
    results, printed = run("gpu_step.py", tmp_path, "--budget_seconds=0")
    assert results["results"] == []
    assert len(results["left"]) == 12
    assert "k/J=0.1 N=2" in printed


def test_sizes_of_variables():
    for size in (20_001, 25_600_000):
        sizes = gpu_step.variable_sizes(size)
        assert sum(sizes) == size
        assert len(sizes) == 16
        assert all(n % 2 for n in sizes[:-1])
        assert min(sizes) > 0


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="There must be a TPU"):
        gpu_utils.replica_devices("TPU", 2)
