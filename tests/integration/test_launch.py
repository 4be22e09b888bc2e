"""`python -m tf_regtopk.run` with a script that trains on two workers."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from tf_regtopk.launch import notes

LIMIT = 240
SCRIPT = """
import os
import signal
import sys

import tf_regtopk

strategy = tf_regtopk.MultiWorkerMirroredStrategy()
import keras
import numpy as np
import tensorflow as tf

backup_dir, result, has_failure = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
number = strategy.cluster_resolver.task_id
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(
        optimizer=tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.RegTopK(0.4)),
        loss="mse")
backup = tf_regtopk.Backup(backup_dir)
first_epoch = backup.restore(model)
x = np.random.default_rng(0).standard_normal((16, 4)).astype("float32")
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = (
    tf.data.experimental.AutoShardPolicy.DATA)
dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :3])).batch(4)


class Lost(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if has_failure and first_epoch == 0 and epoch == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


model.fit(
    dataset.with_options(options), epochs=4, initial_epoch=first_epoch,
    callbacks=[backup, Lost()], shuffle=False, verbose=2 * (number == 0))
if number == 0:
    model.save(result)
backup.delete()
"""


@pytest.fixture
def train(tmp_path):
    """Function that trains, and returns the weights and the output."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, "utf-8")

    def run(name, has_failure):
        result = tmp_path / f"{name}.keras"
        process = subprocess.run(
            [sys.executable, "-m", "tf_regtopk.run", "--workers=2"]
            + ["--max_restarts=1", "--device=cpu"]
            + [f"--log_dir={tmp_path / name}_logs", str(script)]
            + [str(tmp_path / name), str(result), str(int(has_failure))],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        output = process.stdout + process.stderr
        assert process.returncode == 0, output
        return keras.saving.load_model(result).get_weights(), output

    return run


def test_goes_on_to_the_bit_when_a_worker_is_lost(train, tmp_path):
    expected, _ = train("whole", has_failure=False)
    weights, output = train("lost", has_failure=True)
    assert "worker 1 was ended by SIGKILL" in output
    assert "Restart 1 of 1: all workers start again, from the last" in output
    assert "Epoch 3/4" in output
    for attempt in range(2):
        directory = tmp_path / f"lost_logs/attempt-{attempt}"
        assert notes.read(directory, "arrived") == ["0", "1"]
    for array, of_whole in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(array, of_whole)
