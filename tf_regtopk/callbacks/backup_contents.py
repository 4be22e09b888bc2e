"""Contents of a backup: weights, and what Keras leaves out."""

import dataclasses

import h5py
import keras
import numpy as np
import tensorflow as tf

from tf_regtopk.callbacks import backup_replicas
from tf_regtopk.saving import saved_state

_REST, _EPOCH = "tf_regtopk", "tf_regtopk_epoch"


@dataclasses.dataclass(frozen=True)
class EpochState:
    """State of an epoch of which some steps have been taken.

    Args:
        step: The number of these steps.
        num_steps: The number of steps of the whole epoch, 0 if unknown.
        num_replicas: The number of replicas of all workers.
        metrics: For each variable of the metrics, for each replica of this
            process, an array.
    """

    step: int
    num_steps: int
    num_replicas: int
    metrics: list[list[np.ndarray]]


def epoch_state(model: keras.Model, step: int, num_steps: int) -> EpochState:
    """Returns the state of the epoch that a model is in.

    Args:
        model: `keras.Model` that is trained.
        step: The number of steps that were taken of the epoch.
        num_steps: The number of steps of the whole epoch, 0 if unknown.
    """
    metrics = [
        [local.numpy() for local in locals_]
        for locals_ in metrics_variables(model)
    ]
    num_replicas = model.distribute_strategy.num_replicas_in_sync
    return EpochState(step, num_steps, num_replicas, metrics)


def metrics_variables(model: keras.Model) -> list[tuple[tf.Variable, ...]]:
    """For each variable of the metrics, its parts on this process's replicas.

    Each replica adds up on its own, and a metric's result is of their sum.
    """
    strategy = model.distribute_strategy
    return [
        strategy.experimental_local_results(variable.value)
        for variable in model.metrics_variables
    ]


def save(model: keras.Model, path: str, epoch: EpochState | None) -> None:
    """Saves a model, its random states, a checksum, and the epoch's state."""
    with backup_replicas.saved_apart(model):
        model.save_weights(path)
    save_rest(model, path)
    backup_replicas.save(model, path)
    if epoch:
        with h5py.File(path, "a") as file:
            _save_epoch(file.create_group(_EPOCH), epoch)


def load(model: keras.Model, path: str) -> EpochState | None:
    """Loads a model, and returns the epoch's state if one was saved.

    Raises:
        ValueError: If the file does not fit, or is not as it was written.
    """
    with backup_replicas.saved_apart(model):
        model.load_weights(path)
    with h5py.File(path, "r") as file:
        _load_rest(model, file[_REST], path)
        backup_replicas.load(model, file)
        return _load_epoch(file[_EPOCH], path) if _EPOCH in file else None


def save_rest(model: keras.Model, path: str) -> None:
    """Adds to a file what Keras leaves out: random states, and a checksum."""
    with h5py.File(path, "a") as file:
        group = file.create_group(_REST)
        for i, variable in enumerate(_random_states(model)):
            group[str(i)] = variable.numpy()
        group.attrs["checksum"] = _checksum(model)


def _load_rest(model: keras.Model, group: h5py.Group, path: str) -> None:
    states = _random_states(model)
    if len(group) != len(states):
        raise ValueError(
            f"The model must have {len(group)} random states, as when it "
            f"was saved. Received: {len(states)}"
        )
    for i, variable in enumerate(states):
        variable.assign(group[str(i)][()])
    if group.attrs["checksum"] != _checksum(model):
        raise _damaged("weights", path)


def _save_epoch(group: h5py.Group, epoch: EpochState) -> None:
    for i, arrays in enumerate(epoch.metrics):
        for replica, array in enumerate(arrays):
            group[f"{i}/{replica}"] = array
    group.attrs.update(
        step=epoch.step,
        num_steps=epoch.num_steps,
        num_replicas=epoch.num_replicas,
        checksum=_checksum_of_epoch(epoch),
    )


def _load_epoch(group: h5py.Group, path: str) -> EpochState:
    metrics = [
        [group[f"{i}/{replica}"][()] for replica in range(len(group[str(i)]))]
        for i in range(len(group))
    ]
    epoch = EpochState(
        int(group.attrs["step"]),
        int(group.attrs["num_steps"]),
        int(group.attrs["num_replicas"]),
        metrics,
    )
    if group.attrs["checksum"] != _checksum_of_epoch(epoch):
        raise _damaged("metrics", path)
    return epoch


def _damaged(what: str, path: str) -> ValueError:
    return ValueError(
        f"The file must be as it was written. Received: {what} with another "
        f"checksum in {path!r}"
    )


def _checksum_of_epoch(epoch: EpochState) -> int:
    numbers = np.array([epoch.step, epoch.num_steps, epoch.num_replicas])
    arrays = [np.asarray(a) for of_one in epoch.metrics for a in of_one]
    return saved_state.checksum([numbers, *arrays])


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's `keras.random.SeedGenerator`s."""
    weights = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in weights]


def _checksum(model: keras.Model) -> int:
    return saved_state.checksum(v.numpy() for v in model.variables)
