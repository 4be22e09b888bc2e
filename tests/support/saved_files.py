"""Small files as a version saves them, and how a later one goes on from them.

`make_saved_files.py` writes them, to `tests/data/<version>/`:

    index.json      what is to be known of each run
    expected.npz    for each run its weights some steps later
    files.zip       for each run a folder with its model and what it saved

To go on takes nothing but these, so that `RUNS` may change. Without workers all
is run with `tf.config.run_functions_eagerly(True)`, because compiling takes
longer than the rest. Each of two workers runs

    python saved_files.py RESULT save FOLDER
    python saved_files.py RESULT go_on FOLDER RUN
"""

import contextlib
import functools
import json
import os
import pathlib
import sys
import zipfile

import flat_gradients
import keras
import multi_worker_launcher
import numpy as np
import paths
import tensorflow as tf

import tf_regtopk

DATA = paths.TESTS / "data"
TIMEOUT = 240
NUM_STEPS = 3  # Before saving.
NUM_FURTHER_STEPS = 2
WEIGHTS, WHOLE_MODEL = "m.weights.h5", "m.keras"
CHECKPOINT, BACKUP = "checkpoint", "backup"
ALL_WAYS = (WEIGHTS, WHOLE_MODEL, CHECKPOINT, BACKUP)

_lib = tf_regtopk
_REGTOPK = _lib.RegTopK(0.25, mu=4.0)
_CURRENT = _lib.RegTopK(0.25, mu=4.0, q=10.0, denominator="current")

# Every part of the package that is saved, or makes a difference to what is: the
# arguments of `save_run`, and with how many replicas, 0 being no strategy.
RUNS = {
    "regtopk": dict(
        sparsifier=_REGTOPK,
        inner="adam",
        ways=(WEIGHTS, WHOLE_MODEL, CHECKPOINT),
    ),
    "factor masking": dict(
        sparsifier=_CURRENT,
        codec=_lib.Codec("elias_fano", "bfloat16"),
        error_feedback=_lib.Accumulate(momentum=0.9, factor_masking=True),
        scope="per_variable",
    ),
    "momentum": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec("golomb", "float16"),
        error_feedback=_lib.Accumulate(momentum=0.9),
        dense_below=6,
    ),
    "learning rate followed": dict(
        sparsifier=_lib.TopK(0.25),
        error_feedback=_lib.Accumulate(
            clip_norm=3.0, follow_learning_rate=True
        ),
        inner="sgd with a schedule",
        replicas=(2,),
    ),
    "no feedback": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec("bitmap", _lib.Uniform(num_bits=3, bucket_size=4)),
        error_feedback=_lib.NoFeedback(),
        inner="adam",
        replicas=(2,),
    ),
    "ef21": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec("bitmap", "natural"),
        error_feedback=_lib.EF21(),
    ),
    "ef21 with momentum": dict(
        sparsifier=_CURRENT,
        codec=_lib.Codec("int32", "uniform"),
        error_feedback=_lib.EF21(momentum=0.3),
        dense_below=6,
    ),
    "learned shift": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec(values="sign"),
        error_feedback=_lib.LearnedShift(rate=0.5),
        scope="per_variable",
        replicas=(2,),
    ),
    "learned shift with momentum": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec("elias_fano", "ternary"),
        error_feedback=_lib.LearnedShift(momentum=0.5),
    ),
    "local adam": dict(
        sparsifier=_REGTOPK,
        error_feedback=_lib.LocalAdam(_lib.LearnedShift(), beta_2=0.9),
        inner="sgd with a schedule",
        dense_below=6,
        replicas=(2,),
    ),
    "compressed downlink": dict(
        sparsifier=_REGTOPK,
        codec=_lib.Codec("golomb", "float32"),
        error_feedback=_lib.CompressedDownlink(),
    ),
    "compressed downlink of a learned shift": dict(
        sparsifier=_REGTOPK,
        error_feedback=_lib.CompressedDownlink(
            _lib.LearnedShift(momentum=0.5), 0.5, _lib.Codec(values="natural")
        ),
        replicas=(2,),
    ),
    "randomk": dict(
        sparsifier=_lib.RandomK(0.25, seed=5),
        error_feedback=_lib.LearnedShift(momentum=0.5),
        scope="per_variable",
        dense_below=6,
    ),
    "dense": dict(
        sparsifier=_lib.Dense(),
        codec=_lib.Codec(values="natural"),
        error_feedback=_lib.Accumulate(momentum=0.9),
    ),
    "hierarchical": dict(
        sparsifier=_REGTOPK,
        error_feedback=_lib.Accumulate(momentum=0.9),
        hierarchical=True,
        replicas=(2,),
    ),
    "density set": dict(
        sparsifier=_lib.RegTopK(0.1), density=0.4, ways=(BACKUP,)
    ),
    "dense exchange": dict(
        sparsifier=_REGTOPK,
        error_feedback=_lib.EF21(momentum=0.3),
        exchange="dense",
        replicas=(2,),
    ),
    # With more replicas the clock would choose.
    "automatic exchange": dict(
        sparsifier=_REGTOPK,
        error_feedback=_lib.Accumulate(momentum=0.9),
        exchange="auto",
        replicas=(0,),
    ),
    "float64": dict(sparsifier=_REGTOPK, dtype="float64", replicas=(0,)),
    "loss scaled": dict(sparsifier=_REGTOPK, loss_scale=4.0, replicas=(2,)),
}
# Of two workers with a replica each.
WORKERS_RUN = dict(
    sparsifier=_REGTOPK,
    codec=_lib.Codec("golomb", "natural"),
    error_feedback=_lib.LearnedShift(momentum=0.5),
    ways=ALL_WAYS,
)
_INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "sgd with a schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.8)
    ),
    "adam": lambda: keras.optimizers.Adam(0.1),
}


@functools.cache
def strategy_of(replicas):
    """A strategy on logical CPUs, or none for 0 replicas."""
    if replicas == 0:
        return tf.distribute.get_strategy()
    # No collectives, for which all have to meet: eagerly one replica runs after
    # the other.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        tf.distribute.ReductionToOneDevice(),
    )


def make_model(inner="sgd", dtype="float32", loss_scale=None, **kwargs):
    """A compiled model of 43 weights, with a random state."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, dtype=dtype),
            keras.layers.Dropout(0.5, seed=7),
            keras.layers.Dense(3, dtype=dtype),
        ]
    )
    optimizer = tf_regtopk.SparsifiedOptimizer(_INNER[inner](), **kwargs)
    if loss_scale is not None:
        # It grows in the last step.
        optimizer = tf_regtopk.LossScaleOptimizer(
            optimizer, loss_scale, NUM_STEPS + NUM_FURTHER_STEPS - 1
        )
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def take_steps(model, strategy, num_steps):
    """Trains on random gradients, of which each replica has its own."""
    variables = model.trainable_variables
    # There is nothing to convert, and to find that out takes long.
    take_step = tf.autograph.experimental.do_not_convert(
        flat_gradients.step_function(strategy, model.optimizer, variables)
    )
    size = sum(int(np.prod(v.shape)) for v in variables)
    first_step = int(model.optimizer.iterations.numpy())
    for step in range(first_step, first_step + num_steps):
        # NumPy keeps these numbers as they are in all of its versions.
        rng = np.random.RandomState(step)
        shape = strategy.num_replicas_in_sync, size
        take_step(rng.standard_normal(shape))


def weights_of(model):
    """All weights in one array."""
    return flat_gradients.flat_weights(model.trainable_variables)


def random_states(model):
    """The states of the dropout."""
    return [v.numpy().tolist() for v in model.variables if "seed" in v.path]


def sparsified(model):
    """The `SparsifiedOptimizer` of a model."""
    optimizer = model.optimizer
    if isinstance(optimizer, tf_regtopk.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def save_run(
    strategy, folder, ways=(WEIGHTS,), density=None, replicas=(), **kwargs
):
    """Trains, saves in some ways, and trains on.

    Args:
        strategy: The strategy.
        folder: Where to save.
        ways: Those of `ALL_WAYS`.
        density: The density to change to before the first step.
        replicas: For who calls.
        **kwargs: Arguments of `make_model`.

    Returns:
        `(run, expected)`: a JSON-like dict of what is to be known of the run,
        and its weights in the end.
    """
    del replicas
    with strategy.scope():
        model = make_model(**kwargs)
    if density is not None:
        sparsified(model).set_density(density)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(model.to_json())
    if BACKUP in ways:
        # What `fit` calls.
        backup = tf_regtopk.Backup(folder / BACKUP)
        backup.restore(model)
        backup.set_model(model)
        backup.on_train_begin()
        backup.on_epoch_begin(0)
    take_steps(model, strategy, NUM_STEPS)
    model(np.ones((2, 4)), training=True)  # Changes the random state.
    sparsified(model).skipped_steps.assign(1)  # As if there had been one.

    def at(way):
        return tf_regtopk.worker_path(folder / way, strategy)

    for way in ways:
        if way == BACKUP:
            backup.on_epoch_end(0)
        elif way == CHECKPOINT:
            checkpoint = tf.train.Checkpoint(
                model=model, optimizer=model.optimizer
            )
            checkpoint.write(at(way))
        elif way == WHOLE_MODEL:
            model.save(at(way))
        else:
            model.save_weights(at(way))
    run = {
        "ways": list(ways),
        "num_further_steps": NUM_FURTHER_STEPS,
        "density": sparsified(model).density,
        "exchange": sparsified(model).chosen_exchange,
        "random_states": random_states(model),
    }
    take_steps(model, strategy, NUM_FURTHER_STEPS)
    return run, weights_of(model)


def load(strategy, folder, way):
    """The model that was saved in a way of `ALL_WAYS`."""
    path = folder / way

    def load_scope(model=None):
        if strategy.num_replicas_in_sync == 1:  # As good, and simpler.
            return contextlib.nullcontext(path)
        return tf_regtopk.load_scope(path, strategy, model)

    if way == WHOLE_MODEL:
        with load_scope() as own_path, strategy.scope():
            return keras.saving.load_model(own_path)
    with strategy.scope():
        model = keras.models.model_from_json(
            (folder / "model.json").read_text()
        )
    if way == BACKUP:
        assert tf_regtopk.Backup(path).restore(model) == 1
        return model
    with load_scope(model) as own_path:
        if way == CHECKPOINT:
            checkpoint = tf.train.Checkpoint(
                model=model, optimizer=model.optimizer
            )
            checkpoint.read(own_path).assert_existing_objects_matched()
        else:
            model.load_weights(own_path)
    return model


def go_on(strategy, folder, way, run):
    """Loads what was saved in a way of `ALL_WAYS`, and trains on.

    Args:
        strategy: The strategy.
        folder: The folder of the run.
        way: The way.
        run: From `save_run`.

    Returns:
        The weights in the end.
    """
    model = load(strategy, folder, way)
    optimizer = sparsified(model)
    assert optimizer.density == run["density"]
    assert optimizer.chosen_exchange == run["exchange"]
    assert optimizer.skipped_steps.numpy() == 1
    if way == BACKUP:
        assert random_states(model) == run["random_states"]
    take_steps(model, strategy, run["num_further_steps"])
    return weights_of(model)


def versions():
    """The versions that have saved files."""
    return sorted(folder.name for folder in DATA.iterdir())


def runs_of(version):
    """What is known of the runs of a version: a list of dicts."""
    index = json.loads((DATA / version / "index.json").read_text())
    return index["runs"]


def unpack(version, directory):
    """Puts a folder of each run into `directory`, to go on from.

    Args:
        version: The version that has saved them.
        directory: Where to.

    Returns:
        Dict from a run's name to the weights that training is to end with.
    """
    with zipfile.ZipFile(DATA / version / "files.zip") as archive:
        archive.extractall(directory)
    with np.load(DATA / version / "expected.npz") as arrays:
        return dict(arrays)


def launch(directory, *args):
    """Runs this file on two workers, which must have the same result."""
    result, other = multi_worker_launcher.run_workers(
        __file__, 2, directory, TIMEOUT, args
    )
    assert result == other
    return result


def main(result_path, action, folder, run=None):
    tf.get_logger().setLevel("WARNING")
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    folder = pathlib.Path(folder)
    if action == "save":
        run, expected = save_run(strategy, folder, **WORKERS_RUN)
        result = {"run": run, "expected": expected.tolist()}
    else:
        # In the way for which workers ask each other.
        result = go_on(strategy, folder, BACKUP, json.loads(run)).tolist()
    pathlib.Path(result_path).write_text(json.dumps(result))
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
