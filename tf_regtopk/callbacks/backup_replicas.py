"""Contents of a backup: those of each replica that has weights of its own.

Beside the weights that Keras saves, which are those of the first replica, a
file has a `SavedState` of the model's variables and one of each optimizer, in
which the replicas of this process have theirs.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib

import h5py
import keras
import tensorflow as tf

from tf_regtopk.callbacks import of_models
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology
from tf_regtopk.optimizers import decentralized_saving
from tf_regtopk.saving import replica_variables
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files

_REPLICAS = "tf_regtopk_replicas"


def check(model: keras.Model) -> None:
    """Checks the weights of the replicas before a backup, on all workers.

    Between two steps replicas have the same weights, because they apply the
    same sums. Where they have weights of their own it is noted which, so that
    the files of this backup can be told from others.

    Args:
        model: `keras.Model` that is trained.

    Raises:
        RuntimeError: On all workers, unless all replicas have the same weights
            that are to be the same.
    """
    strategy = model.distribute_strategy
    own = []
    for optimizer in _decentralized(model):
        own += optimizer.trained_variables
        optimizer.note_weights(
            _checksums(optimizer.trained_variables, strategy)
        )
    own_ids = {id(variable) for variable in own}
    common = [v for v in model.trainable_variables if id(v) not in own_ids]
    checksums = _checksums(common, strategy)
    if len(set(checksums)) > 1:
        raise RuntimeError(
            "All replicas must have the same weights after an epoch, and after "
            "each of its steps, and nothing is backed up. Go back to the "
            "backup before, and look for what sets weights on one worker only, "
            "or for workers of different versions or processors. Received: "
            f"weights with the checksums {checksums}"
        )


@contextlib.contextmanager
def saved_apart(model: keras.Model) -> Iterator[None]:
    """Lets Keras save and load a model of which `save` and `load` do more."""
    with contextlib.ExitStack() as stack:
        for optimizer in _decentralized(model, several=False):
            stack.enter_context(optimizer.saved_apart())
        yield


def save(model: keras.Model, path: str) -> None:
    """Adds to a file what each replica of this process has of its own.

    Args:
        model: `keras.Model`, after `check`.
        path: Path of the file.
    """
    optimizers = _decentralized(model)
    if not optimizers:
        return
    states = [_state_of(model, optimizers[0].moment)]
    states += [optimizer.save_state() for optimizer in optimizers]
    with h5py.File(path, "a") as file:
        for i, saved in enumerate(states):
            group = file.create_group(f"{_REPLICAS}/{i}")
            for name, array in saved_state.to_arrays(saved).items():
                group[name] = array


def load(model: keras.Model, file: h5py.File) -> None:
    """Gives each replica what it had, after Keras has loaded the file.

    All replicas get the means where their number is another one.

    Args:
        model: `keras.Model` with built optimizers.
        file: The open file.

    Raises:
        ValueError: If anything is missing, damaged, or does not fit.
    """
    if _REPLICAS not in file:
        return
    of_model, *of_optimizers = (
        saved_state.from_arrays({name: part[name][()] for name in part})[0]
        for _, part in sorted(file[_REPLICAS].items(), key=lambda p: int(p[0]))
    )
    optimizers = _decentralized(model, several=False)
    if len(optimizers) != len(of_optimizers):
        raise ValueError(
            f"The model must have {len(of_optimizers)} optimizers that are "
            "`DecentralizedOptimizer`, as when it was saved. Received: "
            f"{len(optimizers)}"
        )
    strategy = model.distribute_strategy
    replicas, num_replicas = _ranks(strategy)
    replica_variables.assign(
        model.variables,
        strategy,
        replica_variables.values_for(
            worker_files.complete(of_model, replicas, num_replicas),
            replicas,
            num_replicas,
            model.variables,
        ),
    )
    # After the weights, from which gossip starts with other replicas.
    for optimizer, saved in zip(optimizers, of_optimizers, strict=True):
        optimizer.load_state(saved)


def _decentralized(
    model: keras.Model, several: bool = True
) -> list[decentralized_saving.DecentralizedSaving]:
    """The optimizers of a model whose replicas have weights of their own.

    Args:
        model: `keras.Model`.
        several: Whether only those of several replicas count.
    """
    return [
        optimizer
        for optimizer in of_models.all_of_model(model)
        if isinstance(optimizer, decentralized_saving.DecentralizedSaving)
        and (optimizer.has_own_weights or not several)
    ]


def _state_of(
    model: keras.Model, moment: dict[str, int]
) -> saved_state.SavedState:
    """The model's variables on the replicas of this process."""
    strategy = model.distribute_strategy
    replicas, num_replicas = _ranks(strategy)
    return saved_state.SavedState(
        {"model": replica_variables.describe(model.variables)},
        moment,
        num_replicas,
        dict(
            zip(
                replicas,
                replica_variables.read(model.variables, strategy),
                strict=True,
            )
        ),
    )


def _ranks(strategy: tf.distribute.Strategy) -> tuple[range, int]:
    """The ranks of this process's replicas, and the number of all."""
    with strategy.scope():
        participants = topology.Participants()
        return participants.local_ranks, participants.count


def _checksums(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> list[int]:
    """For each replica of all workers the checksum of its variables."""
    if not variables:
        return []  # TensorFlow cannot gather nothing.
    of_variables = [replica_state.parts(v, strategy) for v in variables]
    # An int32 takes 31 of a checksum's bits.
    of_local = [
        saved_state.checksum(part.numpy() for part in of_replica) >> 1
        for of_replica in zip(*of_variables, strict=True)
    ]
    gathered = collectives.gather_from_workers(of_local, strategy)
    return [
        int(of_worker[replica % len(of_local)])
        for replica, of_worker in enumerate(gathered)
    ]
