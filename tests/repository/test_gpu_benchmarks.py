"""The benchmarks for GPUs run, on CPUs; what they measure is not tested."""

import json
import types

import fork_server
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.accelerators import gpu_fit
from benchmarks.accelerators import gpu_step
from benchmarks.accelerators import gpu_utils


def run(benchmark, output_dir, *args):
    """The results, and what was printed."""
    args = [*args, "--device_type=CPU", f"--output_dir={output_dir}"]
    result = fork_server.run_one(f"benchmarks.accelerators.{benchmark}", args)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((output_dir / "summary.json").read_text("utf-8"))
    assert not results["failures"]
    return results, result.stdout


@pytest.mark.slow
def test_update(tmp_path):
    results, printed = run(
        "gpu_step",
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
    results, printed = run("gpu_step", tmp_path, "--budget_seconds=0")
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


# ----- fit -----


@pytest.mark.slow
def test_fit(tmp_path):
    results, printed = run(
        "gpu_fit",
        tmp_path,
        "--runs=regtopk:mixed_float16,dense:float32",
        "--model=resnet8",
        "--norm=group",
        "--batch_size=8",
        "--steps_per_epoch=2",
        "--epochs=2",
        "--density=0.01",
        "--budget_seconds=300",
    )
    mixed, dense = results["results"]
    assert mixed["loss_scale"] is not None
    assert dense["loss_scale"] is None
    assert dense["skipped_steps"] == 0
    for r in (mixed, dense):
        assert len(r["loss"]) == 2
        assert r["images_per_second"] > 0
        assert gpu_fit.line(r) in printed


def test_images_can_be_learned():
    images, labels = gpu_fit.make_images(400, np.random.default_rng(0))
    assert images.shape == (400, 32, 32, 3)
    assert images.dtype == np.uint8
    flat = images.reshape(400, -1).astype(float)
    means = [flat[:200][labels[:200] == c].mean(axis=0) for c in range(10)]
    distances = [((flat[200:] - mean) ** 2).sum(axis=1) for mean in means]
    assert np.mean(np.argmin(distances, axis=0) == labels[200:]) > 0.9


@pytest.mark.parametrize("head", ["conv", "dense"])
def test_which_head_needs_cublas(head):
    """TensorFlow gives products of matrices and plain 1 x 1 filters to it."""
    args = types.SimpleNamespace(model="resnet8", norm="batch", head=head)
    model = gpu_fit.build_model(args)
    assert model.output_shape == (None, 10)

    @tf.function
    def gradient(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images, training=True))
        return tape.gradient(loss, model.trainable_variables)

    graph = gradient.get_concrete_function(tf.TensorSpec([2, 32, 32, 3])).graph
    found = {op.type for op in graph.get_operations()}
    assert ("MatMul" in found) == (head == "dense")
    assert not found & {"BatchMatMulV2", "Einsum"}
    strides = {
        op.get_attr("strides")[1]
        for op in graph.get_operations()
        if op.type == "Conv2D" and op.inputs[1].shape[:2] == [1, 1]
    }
    assert strides == {2}
