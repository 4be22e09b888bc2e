"""Trains, saves in every way, and resumes: in one process or as one worker.

    python resume_program.py RESULT save DIRECTORY [DIRECTORY OF ANOTHER RUN]
    python resume_program.py RESULT resume DIRECTORY

`RESULT` gets what `fingerprint` says of the replicas of this process, by the
name of the run.  Without `TF_CONFIG` there is a run for each folder in
`DIRECTORY`, whose name is its number of replicas.
"""

import json
import os
import pathlib
import sys
import warnings
import zlib

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk

STEPS_PER_EPOCH = 3
SAVED_EPOCH, LAST_EPOCH = 2, 4
WAYS = (
    "m.keras",
    "m.weights.h5",
    "checkpoint",
    "manager",
    "backup_and_restore",
    "model_checkpoint.keras",
    "backup",
)
# One of a kind, where two replicas of one process have tried all.
FEW_WAYS = ("m.keras", "checkpoint", "backup")


def ways(strategy):
    """The ways to save and load that are tried under a strategy."""
    is_process = "TF_CONFIG" not in os.environ
    return (
        WAYS if is_process and strategy.num_replicas_in_sync == 2 else FEW_WAYS
    )


def make_model(strategy, sparsifier=None, units=5, **for_compile):
    """A model with random numbers, and variables that are no weights."""
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(units, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.3, seed=7),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.Adam(0.05),
                sparsifier or tf_regtopk.RegTopK(0.25, mu=1.0),
            ),
            loss="mse",
            metrics=["mae"],
            **for_compile,
        )
        model.optimizer.build(model.trainable_variables)
    return model


def make_data(first_epoch):
    """Batches of 24, the same in each epoch wherever one begins."""
    batches = []
    for epoch in range(first_epoch, LAST_EPOCH):
        rng = np.random.default_rng(epoch)
        x = rng.standard_normal((STEPS_PER_EPOCH, 24, 4)).astype("float32")
        batches.append((x, x.sum(axis=2, keepdims=True)))
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return tf.data.Dataset.from_tensor_slices((x, y)).with_options(options)


def fit(model, first_epoch, last_epoch, callbacks=(), initial_epoch=None):
    model.fit(
        make_data(first_epoch),
        initial_epoch=first_epoch if initial_epoch is None else initial_epoch,
        epochs=last_epoch,
        steps_per_epoch=STEPS_PER_EPOCH,
        callbacks=list(callbacks),
        shuffle=False,
        verbose=0,
    )


def fingerprint(model):
    """Checksums of all that training goes on from, on this process."""
    optimizer = model.optimizer
    saved = optimizer.save_state()
    return {
        "model": [_checksum(v) for v in model.variables],
        "optimizer": [_checksum(v) for v in optimizer.variables],
        "replicas": {
            str(replica): [_checksum(array) for array in arrays]
            for replica, arrays in saved.replicas.items()
        },
        "shared": [_checksum(array) for array in saved.shared],
        "weights_of_replicas": [
            _checksum(local)
            for v in model.trainable_variables
            for local in model.distribute_strategy.experimental_local_results(
                v.value
            )
        ],
    }


def _checksum(value):
    value = value.numpy() if hasattr(value, "numpy") else value
    return zlib.crc32(np.ascontiguousarray(value).tobytes())


def change(model, seed):
    """As if it had been trained, which takes longer."""
    rng = np.random.default_rng(seed)
    for v in [*model.variables, *model.optimizer.variables]:
        v.assign(rng.integers(1, 99, v.shape))
    state = model.optimizer.save_state()
    for arrays in state.replicas.values():
        arrays[0] = rng.standard_normal(arrays[0].shape).astype("float32")
    model.optimizer.load_state(state)


def total_error(model):
    """The sum of the residual errors of the replicas of this process."""
    replicas = model.optimizer.save_state().replicas.values()
    return np.sum([arrays[0] for arrays in replicas], axis=0, dtype="float64")


def train_and_save(strategy, directory):
    """Trains to the end, and half-way saves in every way."""
    model = make_model(strategy)

    def at(name):
        return tf_regtopk.worker_path(directory / name, strategy)

    backup = tf_regtopk.Backup(directory / "backup")
    assert backup.restore(model) == 0
    fit(
        model,
        0,
        SAVED_EPOCH,
        [
            keras.callbacks.BackupAndRestore(
                at("backup_and_restore"), delete_checkpoint=False
            ),
            keras.callbacks.ModelCheckpoint(at("model_checkpoint.keras")),
            backup,
        ],
    )
    model.save(at("m.keras"))
    model.save_weights(at("m.weights.h5"))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.write(at("checkpoint"))
    tf.train.CheckpointManager(checkpoint, at("manager"), 1).save()
    if _is_first(strategy):
        # Must not wait for the others.
        model.save(directory / "alone.keras")
        model.save_weights(directory / "alone.weights.h5")
        checkpoint.write(str(directory / "alone"))
    half_way = {
        "total": total_error(model).tolist(),
        "weights": model.optimizer.moment["weights"],
    }
    fit(model, SAVED_EPOCH, LAST_EPOCH)
    return {"half_way": half_way, "end": fingerprint(model)}


def random_states(model):
    """The state of the dropout."""
    return [v.numpy().tolist() for v in model.variables if "seed" in v.path]


def set_random_states(model):
    """Does what Keras leaves undone, in all its ways to save."""
    for v in model.variables:
        if "seed" in v.path:
            v.assign([7, SAVED_EPOCH * STEPS_PER_EPOCH])


def load(way, model, path):
    """Loads the file into the model."""
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    if way == "checkpoint":
        checkpoint.read(path).assert_existing_objects_matched()
    elif way == "manager":
        path = tf.train.latest_checkpoint(path)
        checkpoint.restore(path).assert_existing_objects_matched()
    else:
        model.load_weights(path)


def resume(strategy, directory):
    """Goes on from each of what was saved half-way, to the end."""
    results = {}
    model = make_model(strategy)

    def at(name):
        return tf_regtopk.worker_path(directory / name, strategy)

    for way in ways(strategy):
        if way == "m.keras":
            with strategy.scope():
                model = keras.saving.load_model(at(way))
            kept_by_keras = random_states(model)
            set_random_states(model)
            fit(model, SAVED_EPOCH, LAST_EPOCH)
        elif way == "backup_and_restore":
            set_random_states(model)
            callback = keras.callbacks.BackupAndRestore(
                at(way), delete_checkpoint=False
            )
            fit(model, SAVED_EPOCH, LAST_EPOCH, [callback], initial_epoch=0)
            model._initial_epoch = None  # Keras leaves it.
        elif way == "backup":
            backup = tf_regtopk.Backup(directory / way)
            fit(model, backup.restore(model), LAST_EPOCH, [backup])
        else:
            load(way, model, at(way))
            set_random_states(model)
            fit(model, SAVED_EPOCH, LAST_EPOCH)
        results[way] = fingerprint(model)
    results["kept_by_keras"] = kept_by_keras
    return results


def load_another_world(strategy, directory):
    """What each file of another number of replicas gives this process."""
    results = {}
    model = make_model(strategy)
    for way in ways(strategy):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way == "backup":
                epoch = tf_regtopk.Backup(directory / way).restore(model)
                assert epoch == SAVED_EPOCH, epoch
            else:
                with tf_regtopk.load_scope(
                    directory / way, strategy, model
                ) as path:
                    if way == "backup_and_restore":
                        path = os.path.join(path, "latest.weights.h5")
                    load(way, model, path)
        state = model.optimizer.save_state()
        results[way] = {
            "warnings": [
                str(w.message) for w in caught if "replicas" in str(w.message)
            ],
            "total": total_error(model).tolist(),
            "weights": state.moment["weights"],
            "step": state.moment["step"],
            "errors": [a[0].tolist() for a in state.replicas.values()],
            "is_memory_fresh": all(
                np.isnan(arrays[2]).all() for arrays in state.replicas.values()
            ),
        }
    # Training goes on.
    fit(model, SAVED_EPOCH, LAST_EPOCH)
    results["end"] = fingerprint(model)["weights_of_replicas"]
    return results


def _is_first(strategy):
    return tf_regtopk.worker_path("m", strategy) in ("m", "m.worker-0-of-2")


def main(result_path, action, directory, other=None):
    tf.data.experimental.enable_debug_mode()
    tf.get_logger().setLevel("WARNING")
    directory = pathlib.Path(directory)
    if "TF_CONFIG" in os.environ:
        runs = {"workers": tf_regtopk.MultiWorkerMirroredStrategy()}
    else:
        import logical_devices

        runs = {
            path.name: logical_devices.mirrored_strategy(int(path.name))
            for path in directory.iterdir()
        }
    act = {"save": train_and_save, "resume": resume}[action]
    result = {}
    for name, strategy in runs.items():
        os.makedirs(directory / name, exist_ok=True)
        result[name] = act(strategy, directory / name)
        if other:
            result["another world"] = load_another_world(
                strategy, pathlib.Path(other)
            )
    pathlib.Path(result_path).write_text(json.dumps(result))
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
