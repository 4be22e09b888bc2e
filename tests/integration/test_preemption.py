"""SIGTERM to one of two workers: both back up in the middle of an epoch."""

import re

import keras
import multi_worker_launcher
import numpy as np
import pytest

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
    """Function that starts a launcher of two workers."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, "utf-8")
    with multi_worker_launcher.processes() as started:

        def start(name, run, victim=-1):
            started.append(
                multi_worker_launcher.Process(
                    ["-m", "tf_regtopk.run", "--workers=2", "--device=cpu"]
                    + ["--show=all", f"--log_dir={tmp_path / run}_logs"]
                    + [script, tmp_path / name, tmp_path / f"{name}.keras"]
                    + [victim],
                    tmp_path / f"{run}.txt",
                )
            )
            return started[-1]

        yield start


def logs_of(launcher):
    """What each worker has printed, and of the whole run the last epoch."""
    logs = re.findall(r"\[worker (.)\] Logs: (.*)", launcher.output)
    assert len(logs) == 2
    return dict(logs)


@pytest.mark.slow
def test_two_workers_end_at_the_same_step(start, tmp_path):
    """And the same command goes on to the bit, with the same logs."""
    whole, stopped = start("whole", "whole"), start("stopped", "stopped", 1)
    assert whole.wait(LIMIT) == 0, whole.output
    assert stopped.wait(LIMIT) == 143, stopped.output
    assert "Logs:" not in stopped.output
    said = re.findall(
        r"worker . was asked to end, and has backed up epoch 0, step (\d+)\.",
        stopped.output,
    )
    step = int(said[0])
    assert said == [str(step)] * 2
    assert 3 < step < 20
    names = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert names == {
        f"epoch-000000-step-{step:06d}.worker-{number}-of-2.weights.h5"
        for number in range(2)
    }
    resumed = start("stopped", "resumed")
    assert resumed.wait(LIMIT) == 0, resumed.output
    assert f"Resuming {tmp_path / 'stopped'} after epoch 0 and {step}" in (
        resumed.output
    )
    assert logs_of(resumed) == logs_of(whole)
    weights_of_whole, weights = (
        keras.saving.load_model(tmp_path / f"{name}.keras").get_weights()
        for name in ("whole", "stopped")
    )
    for array, of_whole in zip(weights, weights_of_whole, strict=True):
        np.testing.assert_array_equal(array, of_whole)
    assert not (tmp_path / "stopped").exists()
