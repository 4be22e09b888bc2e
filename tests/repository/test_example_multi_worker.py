"""The example that trains on several workers."""

import functools
import os
import re
import signal
import types

from absl import app
import keras
import multi_worker
import multi_worker_launcher
import numpy as np
import pytest
import quickstart

import tf_regtopk
from tf_regtopk.launch import bootstrap

TIMEOUT = 120


@pytest.fixture
def started():
    with multi_worker_launcher.processes() as processes:
        yield processes


def worker_numbers(output):
    """The numbers of the processes that the launcher says it has started."""
    # The last ones, should a first attempt have met a port that was taken.
    pids = re.findall(r"Started 2 workers \(processes (.*?)\)", output)[-1]
    return [int(pid) for pid in pids.split(", ")]


def assert_gone(number):
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def make_args(**kwargs):
    defaults = dict(
        batch_size=64,
        worker_batch_size=None,
        density=0.01,
        epochs=10,
        indices="auto",
        values="float32",
    )
    return types.SimpleNamespace(**(defaults | kwargs))


DENSITY, EPOCHS = 0.02, 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mirrored):
    """Function from a code of values to a model that is trained here."""

    @functools.cache
    def train(values):
        args = make_args(
            density=DENSITY,
            epochs=EPOCHS,
            values=values,
            output_dir=str(tmp_path_factory.mktemp("trained")),
        )
        data = quickstart.load_digits()
        model, _ = multi_worker.train(mirrored(2), data, args)
        assert model.optimizer.codec == tf_regtopk.Codec(values=values)
        return model

    return train


@pytest.mark.slow
def test_natural_compression_learns_as_well(trained):
    """At density 2 %, as far as one training and 360 test images can tell.

    With 5 % errors the accuracy has a standard error of 1.2 points, and with
    3 % of images on which the two disagree their difference one of 0.9: the
    bounds are more than three of these away from equal ones.
    """
    as_it_is, natural = (
        trained(values).history.history["val_accuracy"][-1]
        for values in ("float32", "natural")
    )
    assert as_it_is > 0.9
    assert natural >= as_it_is - 0.03


@pytest.mark.slow
def test_a_kill_costs_nothing(started, tmp_path, trained):
    """The launcher ends with a worker; the same command goes on as if not.

    It resumes from the last backup of all workers.
    """
    output = tmp_path / "output"

    def launch():
        launcher = multi_worker_launcher.Process(
            ["-m", "tf_regtopk.run", "--workers=2", multi_worker.__file__]
            + [f"--output_dir={output}", f"--epochs={EPOCHS}"]
            + [f"--density={DENSITY}"],
            tmp_path / f"output_{len(started)}.txt",
        )
        started.append(launcher)
        return launcher

    launcher = launch()
    workers = worker_numbers(launcher.wait_for("Epoch 4/", TIMEOUT))
    os.kill(workers[1], signal.SIGKILL)
    status = launcher.wait(TIMEOUT)
    assert status == bootstrap.LOST_A_WORKER, launcher.output
    assert "worker 1 was ended by SIGKILL" in launcher.output
    for worker in workers:
        assert_gone(worker)
    again = launch()
    assert again.wait(TIMEOUT) == 0, again.output
    assert "2 replicas, 64 images per step" in again.output
    resumed = rf"Resuming {output / 'backup'} after epoch (\d+)"
    [first_epoch] = map(int, re.findall(resumed, again.output))
    assert first_epoch >= 2
    begun = re.findall(rf"Epoch (\d+)/{EPOCHS}", again.output)
    assert [*map(int, begun)] == [*range(first_epoch + 1, EPOCHS + 1)]
    assert not (output / "backup").exists()

    # Each worker has had its own part of every batch.
    expected = trained("float32")
    for name, values in expected.history.history.items():
        assert len(values) == EPOCHS
        shown = re.findall(rf" {name}: ([\d.]+)", again.output)
        # Other numbers of threads sum in another order, after which other
        # entries may be selected. `test_launch.py` compares to the bit.
        np.testing.assert_allclose(float(shown[-1]), values[-1], rtol=0.02)

    # The chief's own file is good for inference.
    loaded = keras.saving.load_model(output / "model.keras", compile=False)
    for a, b in zip(loaded.weights, expected.weights, strict=True):
        b = b.numpy()
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(batch_size=64), (63, 0.0196875)),
        (dict(batch_size=64, worker_batch_size=32), (96, 0.03)),
    ],
)
def test_batch_size_and_learning_rate_of_three_workers(flags, expected):
    found = multi_worker.batch_size_and_learning_rate(3, make_args(**flags))
    np.testing.assert_allclose(found, expected)


def test_a_batch_without_an_image_for_each_replica():
    with pytest.raises(app.UsageError, match="`batch_size` must be at least 3"):
        multi_worker.batch_size_and_learning_rate(3, make_args(batch_size=2))


def test_a_batch_larger_than_the_data(mirrored, tmp_path):
    args = make_args(worker_batch_size=1000, output_dir=str(tmp_path))
    with pytest.raises(app.UsageError, match="at most the 1437 images"):
        multi_worker.train(mirrored(2), quickstart.load_digits(), args)


def test_a_loss_after_the_last_epoch(mirrored, tmp_path):
    """There is nothing left to train, and the model is still there."""
    args = make_args(epochs=1, output_dir=str(tmp_path))
    data = quickstart.load_digits()
    first, again = (
        multi_worker.train(mirrored(2), data, args)[0] for _ in range(2)
    )
    assert len(first.history.history["loss"]) == 1
    assert again.history.history == {}
    for a, b in zip(first.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_replicas_see_different_images(mirrored):
    strategy = mirrored(2)
    ids = np.arange(43)

    def parts_of(first_epoch, num_steps):
        dataset = multi_worker.global_batches(ids, ids, 8, first_epoch)
        assert not dataset.options().autotune.enabled
        dataset = dataset.take(num_steps)
        return [
            [part.numpy() for part in strategy.experimental_local_results(x)]
            for x, _ in strategy.experimental_distribute_dataset(dataset)
        ]

    parts = parts_of(0, 10)
    assert np.shape(parts) == (10, 2, 4)
    for epoch in (parts[:5], parts[5:]):
        assert len(np.unique(epoch)) == 40
    assert not np.array_equal(parts[:5], parts[5:])
    # After a break it goes on in the same order.
    np.testing.assert_array_equal(parts_of(1, 5), parts[5:])
