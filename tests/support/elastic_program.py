"""Trains on workers that come and go, and accounts for what a resume loads.

    python elastic_program.py DIRECTORY RULE

`DIRECTORY/ledger.jsonl` gets a line for each resume, with the differences
between what was saved and what all workers have loaded, and one for each step.
The training ends after an epoch in which `DIRECTORY/enough` is there.
"""

import json
import pathlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.saving import worker_files

strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)

STEPS, BATCH, EVERY_STEPS = 40, 60, 10
SECONDS_A_STEP = 0.02
RULES = {
    "accumulate": (
        lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        lambda: tf_regtopk.RegTopK(0.05),
        tf_regtopk.Accumulate,
    ),
    "ef21": (
        lambda: keras.optimizers.SGD(0.05),
        lambda: tf_regtopk.TopK(0.05),
        lambda: tf_regtopk.EF21(0.1),
    ),
    "shift": (
        lambda: keras.optimizers.Adam(0.003),
        lambda: tf_regtopk.RegTopK(0.05),
        lambda: tf_regtopk.LearnedShift(momentum=0.9),
    ),
}


# Where a rule keeps the shift of each replica, whose sum is the first array
# that all of them share.
SHIFT_OF = {"ef21": 0, "shift": 1}


def make_model(rule):
    inner, sparsifier, error_feedback = RULES[rule]
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((20,)),
                keras.layers.Dense(50, activation="relu"),
                keras.layers.Dense(4),
            ]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                inner(), sparsifier(), error_feedback=error_feedback()
            ),
            loss="mse",
        )
    return model


def make_dataset(first_epoch):
    """The batches of each epoch, which depend on its number alone."""

    def batches():
        epoch = first_epoch
        while True:
            rng = np.random.default_rng(epoch)
            for _ in range(STEPS):
                x = rng.standard_normal((BATCH, 20)).astype("float32")
                yield x, np.sin(x[:, :4] * 2)
            epoch += 1

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((BATCH, 20), tf.float32),
            tf.TensorSpec((BATCH, 4), tf.float32),
        ),
    ).with_options(options)


def meet():
    return int(strategy.reduce("SUM", tf.constant(1.0), axis=None))


def state(model):
    """Sums over this worker's replicas, what all share, and the weights."""
    saved = model.optimizer.save_state()
    return _sums(saved.replicas.values()), saved.shared, _weights(model)


def _sums(replicas):
    """Of what the rule remembers; a sparsifier's memory begins anew."""
    num_local = RULES[sys.argv[2]][2]().num_local
    return [
        np.sum(arrays, axis=0, dtype="float64")
        for arrays in zip(*(r[:num_local] for r in replicas), strict=True)
    ]


def _weights(model):
    return [variable.numpy() for variable in model.trainable_variables]


def saved_state(directory):
    """The sums over all replicas in the newest backup, and what they share."""
    positions = {}
    for path in directory.glob("epoch-*.weights.h5"):
        positions.setdefault(path.name.split(".")[0], []).append(path)
    if not positions:
        return None
    states = [
        saved
        for path in positions[max(positions)]
        for saved in worker_files.read_states(str(path))
    ]
    replicas = {}
    for saved in states:
        replicas |= saved.replicas
    assert len(replicas) == states[0].num_replicas
    return _sums(replicas.values()), states[0].shared, states[0].num_replicas


def account(model, directory, rule):
    """Compares what all workers have loaded with what was saved."""
    own = directory / f"loaded-{strategy.cluster_resolver.task_id}.npz"
    sums, shared, weights = state(model)
    np.savez(own, *sums, *shared, *weights)
    num_workers = meet()
    found = {"num_workers": num_workers}
    expected = saved_state(directory / "backup")
    if strategy.is_chief and expected:
        all_loaded = []
        for number in range(num_workers):
            with np.load(directory / f"loaded-{number}.npz") as arrays:
                all_loaded.append([arrays[name] for name in arrays.files])
        num_local = len(sums)
        totals = [sum(a) for a in zip(*all_loaded, strict=True)][:num_local]
        of_all = [loaded[num_local:] for loaded in all_loaded]
        found |= {
            "num_saved": expected[2],
            "lost": max(map(_difference, totals, expected[0])),
            "same_shared": _are_equal(expected[1], shared),
            "same_on_all": all(_are_equal(of_all[0], a) for a in of_all),
        }
        if rule in SHIFT_OF:  # All replicas know the sum of the shifts.
            found["sum_differs"] = _difference(
                shared[0], totals[SHIFT_OF[rule]]
            )
    meet()
    own.unlink()
    return found


def _difference(a, b):
    """The largest difference, relative to the largest entry."""
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def _are_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Ledger(keras.callbacks.Callback):
    """Writes each step down, and ends the training when there are enough."""

    def __init__(self, directory, first_epoch):
        super().__init__()
        self._directory, self._epoch = directory, first_epoch
        self._before = None

    def write(self, **entry):
        if strategy.is_chief:
            with open(self._directory / "ledger.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # A step that is skipped changes nothing.
        now = int(self.model.optimizer.iterations.numpy())
        if now != self._before:
            self.write(event="step", epoch=self._epoch, step=batch, number=now)
            time.sleep(SECONDS_A_STEP)
        self._before = now

    def on_epoch_end(self, epoch, logs=None):
        enough = float((self._directory / "enough").exists())
        if strategy.reduce("SUM", tf.constant(enough), axis=None) > 0:
            self.model.stop_training = True


def main(directory, rule):
    directory = pathlib.Path(directory)
    meet()
    model = make_model(rule)
    backup = tf_regtopk.Backup(directory / "backup", every_steps=EVERY_STEPS)
    first_epoch = backup.restore(model)
    ledger = Ledger(directory, first_epoch)
    number = int(model.optimizer.iterations.numpy())
    ledger.write(
        event="resumed", number=number, **account(model, directory, rule)
    )
    model.fit(
        make_dataset(first_epoch),
        initial_epoch=first_epoch,
        epochs=100_000,
        steps_per_epoch=STEPS,
        callbacks=[ledger, backup],
        shuffle=False,
        verbose=0,
    )
    ledger.write(event="done")
    backup.delete()


if __name__ == "__main__":
    main(*sys.argv[1:])
