"""Trains decentralised replicas, is stopped, and resumes from a `Backup`.

    python decentralized_resume_program.py RESULT save FOLDER
    python decentralized_resume_program.py RESULT resume FOLDER

The program of each worker of `test_decentralized_resume.py`, which also imports
it. `RESULT` gets all that training goes on from, of each replica here.
"""

import json
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

RING = tf_regtopk.Ring()
EPOCHS, STEPS, BATCH_SIZE = 3, 4, 12
# Where the run is stopped: after so many steps of an epoch.
STOP = (1, 3)
EVERY_STEPS = 2
# The newest backup then.
LAST = (1, 2)

RULES = {
    "none": dict(topology=RING),
    "EF21": dict(
        topology=RING,
        sparsifier=tf_regtopk.TopK(0.2),
        error_feedback=tf_regtopk.EF21(),
        consensus_step_size=0.3,
    ),
    "Accumulate": dict(
        topology=RING,
        codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        error_feedback=tf_regtopk.Accumulate(),
    ),
    "tracker": dict(
        topology=RING,
        mixing_rule=tf_regtopk.AverageTracker(),
        communication_period=3,
    ),
    "CompNGC": dict(
        topology=RING,
        cross_gradients=tf_regtopk.CrossGradients(
            codec=tf_regtopk.Codec(values="sign")
        ),
    ),
}
INNER = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.05),
}


class Stopped(Exception):
    """What ends a run before its time."""


class StopAt(keras.callbacks.Callback):
    def __init__(self, epoch, step):
        super().__init__()
        self._at = epoch, step

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._step = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if (self._epoch, self._step) == self._at:
            raise Stopped


class CrossNetwork(tf_regtopk.CrossGradientTraining, keras.Sequential):
    """A model for an optimizer with cross gradients."""


def make_model(strategy, rule="EF21", inner="momentum", seed=3, units=5):
    """A model with moving statistics, random states and slots."""
    keras.utils.set_random_seed(seed)
    has_cross_gradients = "cross_gradients" in RULES[rule]
    kind = CrossNetwork if has_cross_gradients else keras.Sequential
    with strategy.scope():
        model = kind(
            [
                keras.Input((4,)),
                keras.layers.Dense(units, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.3, seed=seed),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            tf_regtopk.DecentralizedOptimizer(INNER[inner](), **RULES[rule]),
            loss="mse",
            metrics=["mae"],
        )
        model.optimizer.build(model.trainable_variables)
    return model


def make_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * BATCH_SIZE, 4)).astype("float32")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    data = tf.data.Dataset.from_tensor_slices((x, np.sin(2 * x[:, :1])))
    return data.batch(BATCH_SIZE).with_options(options)


def fit(model, callbacks=(), first_epoch=0, epochs=EPOCHS):
    """Returns the logs of all epochs."""
    return model.fit(
        make_data(),
        initial_epoch=first_epoch,
        epochs=epochs,
        callbacks=list(callbacks),
        verbose=0,
    ).history


def fit_until_stopped(model, folder, every_steps=EVERY_STEPS):
    backup = tf_regtopk.Backup(folder, every_steps)
    assert backup.restore(model) == 0
    try:
        fit(model, [backup, StopAt(*STOP)])
    except Stopped:
        return
    raise AssertionError("The run was to be stopped")


def back_up(model, folder, num_epochs=1):
    """What `fit` calls, of replicas that have random numbers of their own."""
    backup = tf_regtopk.Backup(folder)
    assert backup.restore(model) == 0
    backup.set_model(model)
    backup.on_train_begin()
    for epoch in range(num_epochs):
        backup.on_epoch_begin(epoch)
        change(model, epoch)
        backup.on_epoch_end(epoch)


def change(model, seed):
    """As if the replicas had been trained, which takes longer."""
    rng = np.random.default_rng(seed)
    strategy, optimizer = model.distribute_strategy, model.optimizer
    for variable in [*model.variables, *optimizer.variables]:
        parts = strategy.experimental_local_results(variable.value)
        common = rng.integers(1, 99, variable.shape)
        for part in parts:
            is_float = part.dtype.is_floating
            part.assign(rng.random(part.shape) if is_float else common)
    state = optimizer.save_state()
    num_variables = len(optimizer.variables)
    for arrays in state.replicas.values():
        for i in range(num_variables, len(arrays)):
            values = 99 * rng.random(arrays[i].shape)
            arrays[i] = values.astype(arrays[i].dtype)
    optimizer.load_state(state)


def resume(model, folder):
    """Goes on to the end. Returns the logs."""
    backup = tf_regtopk.Backup(folder)
    return fit(model, [backup], backup.restore(model))


def named_variables(model):
    return {
        f"{name} {i}": variable
        for name, of_one in (("model", model), ("optimizer", model.optimizer))
        for i, variable in enumerate(of_one.variables)
    }


def kept(model):
    """For each replica of this process all that it goes on from, by names.

    "kept" is all that is in no Keras variable.
    """
    strategy, optimizer = model.distribute_strategy, model.optimizer
    states = optimizer.save_state().replicas.values()
    found = [
        {"kept": [np.asarray(array).tolist() for array in arrays]}
        for arrays in states
    ]
    for name, variable in named_variables(model).items():
        parts = strategy.experimental_local_results(variable.value)
        for of_replica, part in zip(found, parts, strict=True):
            of_replica[name] = part.numpy().tolist()
    return found


def mixed(folder, worker):
    """The path of a folder whose files are of two runs."""
    return folder / "run" if worker == 0 else folder / "other run"


def restore_of_two_runs(strategy, folder):
    """The error of workers whose backups are of the same step, not run."""
    worker = strategy.cluster_resolver.task_id
    try:
        tf_regtopk.Backup(mixed(folder, worker)).restore(make_model(strategy))
    except ValueError as error:
        return str(error)
    return None


def main(result_path, action, folder):
    # As in `logical_devices.py`.
    tf.data.experimental.enable_debug_mode()
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    folder = pathlib.Path(folder)
    result = {}
    if action == "save":
        whole = make_model(strategy)
        result["logs"] = fit(whole)
        result["end"] = kept(whole)
        for name, seed in (("run", 3), ("other run", 4)):
            model = make_model(strategy, seed=seed)
            fit_until_stopped(model, folder / name)
            model = make_model(strategy)
            tf_regtopk.Backup(folder / name).restore(model)
            result[name] = kept(model)
    else:
        result["two runs"] = restore_of_two_runs(strategy, folder)
        model = make_model(strategy)
        result["logs"] = resume(model, folder / "run")
        result["end"] = kept(model)
    pathlib.Path(result_path).write_text(json.dumps(result))
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
