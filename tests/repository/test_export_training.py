"""What is exported for JAX takes the steps of the training it stands for."""

import json
import types
import zlib

import cifar10_resnet
import fork_server
import image_training
import keras
import numpy as np
import old_versions
import paths
import pytest
import run_with_mock_data
import tensorflow as tf
import training_programs

KEPT_RUNS = paths.ROOT / "docs/results/cifar10_resnet8_iid/runs.jsonl"

ARGS = types.SimpleNamespace(
    model="resnet8",
    norm="group",
    num_workers=2,
    batch_size=3,
    rounds=4,
    evaluate_every=4,
    split="iid",
    shard_sizes="equal",
    density=0.05,
    momentum=0.9,
    inner_optimizer="sgd",
    mu=4.0,
    denominator="previous",
    indices="auto",
    values="float32",
)
RATE, SEED, HELD_OUT = 0.01, 3, 4
MINE = """
import keras

def plain(hyper):
    return keras.optimizers.SGD(hyper.learning_rate)
"""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=[40, 32, 32, 3]).astype(np.uint8)
    return images, rng.integers(10, size=40)


@pytest.fixture(scope="module")
def start():
    keras.utils.set_random_seed(SEED)
    return cifar10_resnet.build_model(ARGS)


@pytest.fixture(scope="module")
def gradients_of(start, data):
    """Of the weights and the numbers.

    Not compiled by XLA, so that they are Keras's but for the last bits: else
    the sign of some activation before a ReLU differs, which tells.
    """
    network = training_programs.Network(start)
    images, labels = data
    return tf.function(
        lambda weights, numbers: network.gradients(
            weights, images, labels.astype(np.int32), numbers
        ),
        autograph=False,
    )


def flat(weights):
    return np.concatenate([w.ravel() for w in weights])


def train_by_keras(monkeypatch, strategy, data, method):
    """The weights at the end of a run of the example."""
    weights = []

    class Keeper(keras.callbacks.Callback):
        rounds, accuracies = (), ()

        def on_train_end(self, logs=None):
            weights.extend(self.model.get_weights())

    monkeypatch.setattr(image_training, "Tester", lambda *args: Keeper())
    task = image_training.Task(
        lambda: cifar10_resnet.build_model(ARGS), *data, data, HELD_OUT
    )
    result = image_training.train(
        task, strategy, ARGS, False, method, RATE, SEED
    )
    return flat(weights), result["bytes_a_step"]


@pytest.mark.parametrize(
    "name",
    [
        "ef21",
        pytest.param("dense", marks=pytest.mark.slow),
        pytest.param("shift_masked", marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_example(
    monkeypatch, mirrored, data, start, gradients_of, name
):
    method = training_programs.Method(name, ARGS, start)
    numbers = image_training.numbers_of(
        data[1][:-HELD_OUT], ARGS, SEED, ARGS.rounds
    )
    before = flat(start.get_weights())
    state = method.start(tf.constant(before))
    step = tf.function(method.step, jit_compile=True, autograph=False)
    for t, batch in enumerate(numbers.astype(np.int32)):
        gradients = gradients_of(state[0], tf.constant(batch))
        state = step(gradients, tf.constant(t), tf.constant(RATE), *state)

    expected, num_bytes = train_by_keras(monkeypatch, mirrored(2), data, name)
    assert method.bytes_a_step == num_bytes
    moved = np.linalg.norm(expected - before)
    assert np.linalg.norm(state[0] - expected) < 1e-4 * moved


@old_versions.needs_data_sets
@old_versions.needs_stablehlo
def test_exported_files(tmp_path, start):
    """The programs are small, and the images and weights are what they were."""
    programs = tmp_path / "programs"
    path = tmp_path / "mine.py"
    path.write_text(MINE, "utf-8")
    mine = f"{path}:plain"
    result = fork_server.run_one(
        run_with_mock_data.__file__,
        [
            80,
            "benchmarks.accelerators.export_training",
            f"--programs_dir={programs}",
            f"--seeds={SEED}",
            f"--methods=shift_regtopk,{mine}",
            "--num_workers=2",
            "--batch_size=3",
            "--rounds=4",
        ],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    index = json.loads((programs / "index.json").read_text("utf-8"))
    assert index["setting"]["rounds"] == 4 and index["tuning_seeds"] == []
    # The example finds runs by all flags that say something of them.
    with open(KEPT_RUNS, encoding="utf-8") as runs:
        kept = json.loads(runs.readline())["setting"]
    of_a_run = {"is_tuning", "method", "learning_rate", "seed"}
    assert set(index["setting"]) == set(kept) - of_a_run
    # A user's method has a path for a name, and what it was tells its runs.
    assert index["file_names"]["shift_regtopk"] == "shift_regtopk"
    assert index["versions"] == {
        "shift_regtopk": {},
        mine: {"method_crc32": zlib.crc32(MINE.encode())},
    }
    names = {
        f"{part}_{index['file_names'][method]}.mlir"
        for part in ("start", "step")
        for method in ("shift_regtopk", mine)
    } | {"gradients.mlir", "predict.mlir"}
    assert {path.name for path in programs.glob("*.mlir")} == names
    for path in programs.glob("*.mlir"):
        assert "stablehlo" in path.read_text("utf-8")
        assert path.stat().st_size < 1_000_000
    with np.load(programs / "images.npz") as arrays:
        assert arrays["train_images"].shape == (80, 32, 32, 3)
        assert arrays["test_labels"].shape == (80,)
    with np.load(programs / f"start_{SEED}.npz") as arrays:
        assert arrays["numbers"].shape == (4, 2, 3)
        np.testing.assert_array_equal(
            arrays["weights"], flat(start.get_weights())
        )
