"""SIGTERM to one of two workers: both back up in the middle of an epoch."""

import json
import re

import keras
import multi_worker_launcher
import numpy as np
import pytest

from tf_regtopk.launch import notes

LIMIT = 240
# A worker takes 0.1 s for a step until the end is agreed on, so that the
# workers meet after at most 10 steps.
SCRIPT = """
import os
import signal
import sys
import time

import tf_regtopk

strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=100)
import keras
import numpy as np
import tensorflow as tf

backup_dir, result, victim = sys.argv[1], sys.argv[2], int(sys.argv[3])
number = strategy.cluster_resolver.task_id
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dropout(0.3, seed=1),
        keras.layers.Dense(3)])
    model.compile(
        optimizer=tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.RegTopK(0.4)),
        loss="mse", metrics=["mae"])
backup = tf_regtopk.Backup(backup_dir)
first_epoch = backup.restore(model)
x = np.random.default_rng(0).standard_normal((80, 4)).astype("float32")
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = (
    tf.data.experimental.AutoShardPolicy.DATA)
dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :3])).batch(4)


class Preempted(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if victim >= 0:
            time.sleep(0.1)
            if batch == 3 and number == victim:
                os.kill(os.getpid(), signal.SIGTERM)


history = model.fit(
    dataset.with_options(options), epochs=2, initial_epoch=first_epoch,
    callbacks=[Preempted(), backup], shuffle=False, verbose=0).history
print("Logs:", history)
if number == 0:
    model.save(result)
backup.delete()
"""


@pytest.fixture
def start(tmp_path):
    """Function that starts a launcher for each of two workers."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, "utf-8")
    with multi_worker_launcher.processes() as started:

        def start(name, run, victim=-1):
            addresses = multi_worker_launcher.free_addresses(2)
            launchers = [
                multi_worker_launcher.Process(
                    ["-m", "tf_regtopk.run", "--device=cpu", "--show=all"]
                    + [f"--log_dir={tmp_path / run}_logs"]
                    + [script, tmp_path / name, tmp_path / f"{name}.keras"]
                    + [victim],
                    tmp_path / f"{run}_{number}.txt",
                    TF_CONFIG=multi_worker_launcher.tf_config(
                        addresses, number
                    ),
                )
                for number in range(2)
            ]
            started.extend(launchers)
            return launchers

        yield start


def logs_of(launchers):
    """What each worker has printed, and of the whole run the last epoch."""
    return [re.search("Logs: (.*)", each.output)[1] for each in launchers]


@pytest.mark.slow
def test_two_workers_end_at_the_same_step(start, tmp_path):
    """And the same command goes on to the bit, with the same logs."""
    runs = start("whole", "whole"), start("stopped", "stopped", victim=1)
    for launcher in runs[0]:
        assert launcher.wait(LIMIT) == 0, launcher.output
    said = []
    for number, launcher in enumerate(runs[1]):
        assert launcher.wait(LIMIT) != 0, launcher.output
        attempt = tmp_path / f"stopped_logs/worker-{number}/attempt-0"
        error = json.loads((attempt / f"worker-{number}.error").read_text())
        assert error["status"] == 143
        assert "Logs:" not in launcher.output
        said += notes.read(attempt, "backed_up")
    assert said[0] == said[1]
    step = int(re.fullmatch(r"epoch 0, step (\d+)", said[0])[1])
    assert 3 < step < 20
    names = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert names == {
        f"epoch-000000-step-{step:06d}.worker-{number}-of-2.weights.h5"
        for number in range(2)
    }
    resumed = start("stopped", "resumed")
    for launcher in resumed:
        assert launcher.wait(LIMIT) == 0, launcher.output
        assert f"Resuming {tmp_path / 'stopped'} after epoch 0 and {step}" in (
            launcher.output
        )
    assert logs_of(resumed) == logs_of(runs[0])
    whole, stopped = (
        keras.saving.load_model(tmp_path / f"{name}.keras").get_weights()
        for name in ("whole", "stopped")
    )
    for array, of_whole in zip(stopped, whole, strict=True):
        np.testing.assert_array_equal(array, of_whole)
    assert not (tmp_path / "stopped").exists()
