"""`python -m tf_regtopk.run` with a script that trains on two workers."""

import json

import multi_worker_launcher
import pytest

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import notes
from tf_regtopk.launch import shares

LIMIT = 240
SCRIPT = """
import json
import os
import pathlib
import signal
import sys
import time

import tf_regtopk

strategy = tf_regtopk.MultiWorkerMirroredStrategy()
import keras
import numpy as np
import tensorflow as tf

result, backup_dir, has_failure = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
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


def num_processes():
    launcher = os.getppid()
    children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children")
    return len(children.read_text().split())


class Lost(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if has_failure and first_epoch == 0 and epoch == 2 and number == 1:
            while "STANDBYS" in os.environ and num_processes() < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


model.fit(
    dataset.with_options(options), epochs=4, initial_epoch=first_epoch,
    callbacks=[backup, Lost()], shuffle=False, verbose=2 * (number == 0))
pathlib.Path(result).write_text(
    json.dumps([array.tolist() for array in model.get_weights()]))
backup.delete()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT, "utf-8")
    return path


@pytest.fixture
def weights_of_whole(script, tmp_path):
    """Those of two workers that were neither launched nor lost."""
    first, second = multi_worker_launcher.run_workers(
        script,
        num_workers=2,
        directory=tmp_path,
        timeout=LIMIT,
        args=[tmp_path / "whole", 0],
    )
    assert first == second
    return first


@pytest.fixture
def start(script, tmp_path):
    """Function that starts a launcher of the script."""
    with multi_worker_launcher.processes() as started:

        def start(name, has_failure, *options, **env):
            started.append(
                multi_worker_launcher.Process(
                    ["-m", "tf_regtopk.run", "--max_restarts=1"]
                    + ["--device=cpu", f"--log_dir={tmp_path / name}_logs"]
                    + [*options, script, tmp_path / f"{name}.json"]
                    + [tmp_path / name, int(has_failure)],
                    tmp_path / f"{name}-{len(started)}.txt",
                    **env,
                )
            )
            return started[-1]

        yield start


def wait_for(*launchers):
    for launcher in launchers:
        assert launcher.wait(LIMIT) == 0, launcher.output


def weights(tmp_path, name):
    """Those of a run that a worker was lost in."""
    return json.loads((tmp_path / f"{name}.json").read_text("utf-8"))


def test_goes_on_to_the_bit_when_a_worker_is_lost(
    start, weights_of_whole, tmp_path
):
    """With launchers of two machines, and as if nothing had happened."""
    [port] = shares.free_ports(1, "127.0.0.1")
    launchers = [
        start(
            "lost",
            True,
            "--hosts=127.0.0.1,127.0.0.2",
            f"--host={host}",
            f"--rendezvous_port={port}",
            TF_REGTOPK_SECRET="secret",
        )
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    wait_for(*launchers)
    for launcher, host in zip(
        launchers, ("127.0.0.1", "127.0.0.2"), strict=True
    ):
        assert "worker 1 was ended by SIGKILL" in launcher.output
        assert "Restart 1 of 1: all workers start again, from the last" in (
            launcher.output
        )
        for attempt in range(2):
            directory = tmp_path / f"lost_logs/{host}/attempt-{attempt}"
            assert len(notes.read(directory, "met")) == 1
    assert "Epoch 3/4" in launchers[0].output
    assert weights(tmp_path, "lost") == weights_of_whole


@pytest.mark.slow
def test_other_ways_to_start_go_on_as_well(start, weights_of_whole, tmp_path):
    """On one machine, and by launchers that know nothing of each other."""
    alone = start("alone", True, "--workers=2")
    wait_for(alone)
    assert "worker 1 was ended by SIGKILL" in alone.output
    addresses = multi_worker_launcher.free_addresses(2)
    told = [
        start(
            "told",
            True,
            TF_CONFIG=multi_worker_launcher.tf_config(addresses, number),
        )
        for number in range(2)
    ]
    wait_for(*told)
    for number, launcher in enumerate(told):
        assert f"This is worker {number} of 2, by `TF_CONFIG`." in (
            launcher.output
        )
    assert f"No connection to: worker 1 ({addresses[1]})." in told[0].output
    for name in ("alone", "told"):
        assert weights(tmp_path, name) == weights_of_whole


@pytest.mark.slow
def test_standbys_go_on_to_the_bit(start, weights_of_whole, tmp_path):
    """Although these have not imported all when the worker is lost."""
    launcher = start("lost", True, "--workers=2", "--standby", STANDBYS="1")
    wait_for(launcher)
    assert "), 2 from standbys, with their output" in launcher.output
    assert weights(tmp_path, "lost") == weights_of_whole


@pytest.mark.slow
def test_a_worker_whose_peer_does_not_come(start):
    addresses = multi_worker_launcher.free_addresses(2)
    lonely = start(
        "lonely",
        False,
        "--max_restarts=0",
        "--start_timeout=3",
        TF_CONFIG=multi_worker_launcher.tf_config(addresses, 0),
    )
    assert lonely.wait(LIMIT) == bootstrap.LOST_A_WORKER
    assert "worker 0 has waited 3 s (`--start_timeout`)" in lonely.output
    assert f"No connection to: worker 1 ({addresses[1]})." in lonely.output
