"""Saving a run so that it can be stopped, resumed and resized."""

from collections.abc import Iterator
import contextlib
import os
import re
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf

from tf_regtopk.callbacks import load_scope
from tf_regtopk.distribute import collectives
from tf_regtopk.launch import notes
from tf_regtopk.log import logger
from tf_regtopk.optimizers import wrapper
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files

_PARTIAL, _DAMAGED, _DELETED = "partial.", "damaged.", "epochs.deleted"
_REST = "tf_regtopk"
# The names of the files that a backup writes, and of no others. An epoch has at
# most 9 digits, because workers tell each other an int32.
_EPOCH_FILE = re.compile(
    r"epoch-(\d{6}|[1-9]\d{6,8})(\.worker-\d+-of-\d+)?\.weights\.h5"
)


class Backup(keras.callbacks.Callback):
    """Backs up the whole training after every epoch, and resumes it.

    `fit` then goes on to the bit as if it had not been interrupted: weights,
    optimizer, every replica's residual error, and the random states of dropout
    and the like, which Keras's ways of saving leave out. Every worker gives the
    same folder, whether or not they share a disk, and writes its own files; the
    workers agree on the newest epoch that all of them can load. Another number
    of workers or replicas can go on, if it can read the files of all. A file
    gets its name once it is complete, and the epoch before stays: training goes
    on from the epoch before where the newest file is damaged. Replicas whose
    weights have drifted apart end the training with an error. Callbacks that
    change the training at the end of an epoch come before this one.

    Args:
        directory: Path of a folder, the same on every worker. Other files in
            the folder stay as they are.

    Example:

    ```python
    backup = tf_regtopk.Backup("backup")
    first_epoch = backup.restore(model)  # 0 if there is nothing to resume.
    model.fit(
        batches_from(first_epoch),
        initial_epoch=first_epoch,
        epochs=10,
        callbacks=[backup],
    )
    backup.delete()
    ```

    The order of the data is up to the data set: to resume to the bit, it has to
    give in epoch n what it gave in epoch n before.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__()
        self.directory = os.fspath(directory)
        self._restored: keras.Model | None = None
        self._next_epoch: int | None = None

    def restore(self, model: keras.Model) -> int:
        """Loads the newest backup, if there is any. To be called before `fit`.

        Args:
            model: The compiled `keras.Model`, built and in the scope of its
                strategy. Optimizers that are attributes of the model, as in a
                GAN, must be built as well.

        Returns:
            Number of the epoch to go on with, for `initial_epoch`.

        Raises:
            FileNotFoundError: If the backups of some workers are missing.
            ValueError: If they cannot be loaded, or differ in their weights.
        """
        notes.write("backup", os.path.abspath(self.directory))
        wrapper.all_of_model(model)  # Builds that of `compile`.
        self._clean_up()
        epoch = self._load_newest(model)
        _check_workers_agree(model)
        for found, path in self._files():
            if found > epoch:  # Some workers had saved it, and not all.
                logger.warning("Removing %s, which not all have", path)
                _remove(path)
        self._restored, self._next_epoch = model, epoch
        return epoch

    def _load_newest(self, model: keras.Model) -> int:
        """Loads the newest epoch that all workers can load, and returns it."""
        strategy = model.distribute_strategy
        refused: dict[int, Exception] = {}
        for epoch in self._epochs_of_all(strategy):
            error = self._load(epoch, model)
            # All workers go on from the same epoch.
            could = collectives.gather_from_workers(
                [int(error is None)], strategy
            )[:, 0]
            if could.all():
                logger.info("Resuming %s after epoch %d", self.directory, epoch)
                self._keep_damaged(refused, epoch)
                return epoch
            refused[epoch] = error or ValueError(
                "The backups of all replicas must be as they were written. "
                f"Received: for epoch {epoch} others at the replicas "
                f"{np.flatnonzero(could == 0).tolist()}, whose logs say why"
            )
        for error in refused.values():
            raise error
        return 0

    def _keep_damaged(self, refused: dict[int, Exception], epoch: int) -> None:
        """Renames the files that were refused, and says which and why."""
        for damaged, path in self._files():
            if damaged in refused:
                _rename(path, _DAMAGED)
        for damaged, error in refused.items():
            logger.warning(
                "Resuming %s after epoch %d, because the backup of epoch %d "
                'cannot be loaded (kept as "%s..."): %s',
                self.directory,
                epoch,
                damaged,
                _DAMAGED,
                error,
            )

    def _load(self, epoch: int, model: keras.Model) -> Exception | None:
        """Loads the backup of an epoch, or returns why not."""
        strategy = model.distribute_strategy
        try:
            with load_scope.load_scope(
                self._path(epoch), strategy, model
            ) as path:
                model.load_weights(path)
                _load_rest(model, path)
        except (FileNotFoundError, ValueError) as error:
            return error
        return None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._restored is not self.model:
            raise ValueError(
                "`Backup.restore(model)` must be called before `fit`, and its "
                "result be given as `initial_epoch`"
            )

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if epoch != self._next_epoch:
            raise ValueError(
                "`initial_epoch` must be what `Backup.restore` has returned, "
                f"or the number of epochs trained since, {self._next_epoch}. "
                f"Received: initial_epoch={epoch}"
            )

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        _check_replicas_agree(self.model)
        path = worker_files.worker_path(
            self._path(epoch + 1), self.model.distribute_strategy
        )
        directory, name = os.path.split(path)
        partial = os.path.join(directory, _PARTIAL + name)
        self.model.save_weights(partial)
        _save_rest(self.model, partial)
        _flush(partial)
        os.replace(partial, path)
        _flush(directory)
        # All workers have saved the epoch before: they met since.
        for found, old in self._files():
            if found < epoch:
                _remove(old)
        self._next_epoch = epoch + 1

    def delete(self) -> None:
        """Deletes the backups, all at once, when all workers are done.

        To be called by every worker. It waits for the others. The folder goes
        as well, if nothing else is in it and it can be removed.
        """
        if self._restored is None:
            raise ValueError("`Backup.restore(model)` must be called first")
        strategy = self._restored.distribute_strategy
        collectives.gather_from_workers([0], strategy)
        # From here on the backups count as deleted, also if this ends midway.
        with open(os.path.join(self.directory, _DELETED), "w"):
            pass
        _flush(self.directory)
        # Nobody needs the folder of several workers for that any more.
        collectives.gather_from_workers([0], strategy)
        self._remove_files()
        # A mount point, a link, or a folder with other files in it stays.
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def _clean_up(self) -> None:
        """Removes what an earlier run was about to write or to delete."""
        # A link may lead to a folder that is not there yet.
        os.makedirs(os.path.realpath(self.directory), exist_ok=True)
        if os.path.exists(os.path.join(self.directory, _DELETED)):
            self._remove_files()
        for _, path in self._files(_PARTIAL):
            _remove(path)

    def _remove_files(self) -> None:
        """Removes every file that backups have written here, the mark last."""
        for prefix in ("", _PARTIAL, _DAMAGED):
            for _, path in self._files(prefix):
                _remove(path)
        _remove(os.path.join(self.directory, _DELETED))

    def _path(self, epoch: int) -> str:
        return os.path.join(self.directory, f"epoch-{epoch:06d}.weights.h5")

    def _files(self, prefix: str = "") -> Iterator[tuple[int, str]]:
        """Epoch and path of every backup here, of any worker."""
        # Another worker may have removed a folder that they share.
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                match = _EPOCH_FILE.fullmatch(name.removeprefix(prefix))
                path = os.path.join(self.directory, name)
                if name.startswith(prefix) and match and os.path.isfile(path):
                    yield int(match.group(1)), path

    def _epochs_of_all(self, strategy: tf.distribute.Strategy) -> list[int]:
        """The epochs that every worker has, the same on each, newest first."""
        here = sorted({epoch for epoch, _ in self._files()})
        loadable = [
            epoch
            for epoch in here
            if worker_files.find_files(self._path(epoch), strategy)
        ]
        # Two at most: the workers are never more than one epoch apart.
        newest = ([0, 0] + loadable)[-2:]
        of_all = collectives.gather_from_workers([len(here), *newest], strategy)
        common = set.intersection(*(set(row[1:].tolist()) for row in of_all))
        epochs = sorted(common - {0}, reverse=True)
        # One file without its peers is a first backup cut short: no loss.
        if not epochs and max(row[0] for row in of_all) > 1:
            raise FileNotFoundError(
                "The backups must be there of every worker for one of the last "
                f"two epochs. Received: in {self.directory!r} those of epochs "
                f"{here}, of which this worker can load {loadable}. Give all "
                "workers the folders back; or, if the run had ended or is to "
                "start anew, delete these"
            )
        if here and not epochs:
            logger.warning("The first backup was cut short. Starting anew")
        return epochs


def _check_workers_agree(model: keras.Model) -> None:
    """Raises unless all workers go on from the same step and weights."""
    moments = [optimizer.moment for optimizer in wrapper.all_of_model(model)]
    # An int32 takes 31 of the checksum's bits.
    numbers = [
        *(moment["step"] for moment in moments),
        *(moment["weights"] >> 1 for moment in moments),
    ]
    of_all = collectives.gather_from_workers(numbers, model.distribute_strategy)
    if not np.all(of_all == of_all[0]):
        raise ValueError(
            "The workers' backups must be of the same run. Received: steps "
            f"{of_all[:, : len(moments)].tolist()} and weights with the "
            f"checksums {of_all[:, len(moments) :].tolist()}"
        )


def _check_replicas_agree(model: keras.Model) -> None:
    """Raises on all workers unless all replicas have the same weights.

    Between two steps they have, because they apply the same sums.
    """
    strategy = model.distribute_strategy
    of_variables = [
        strategy.experimental_local_results(variable.value)
        for variable in model.trainable_variables
    ]
    # An int32 takes 31 of a checksum's bits.
    of_local = [
        saved_state.checksum(v.numpy() for v in of_replica) >> 1
        for of_replica in zip(*of_variables, strict=True)
    ]
    gathered = collectives.gather_from_workers(of_local, strategy)
    checksums = [
        int(of_worker[replica % len(of_local)])
        for replica, of_worker in enumerate(gathered)
    ]
    if len(set(checksums)) > 1:
        raise RuntimeError(
            "All replicas must have the same weights after an epoch, and this "
            "epoch is not backed up. Go back to the backup before, and look "
            "for what sets weights on one worker only, or for workers of "
            "different versions or processors. Received: weights with the "
            f"checksums {checksums}"
        )


def _save_rest(model: keras.Model, path: str) -> None:
    """Adds to a file what Keras leaves out: random states, and a checksum."""
    with h5py.File(path, "a") as file:
        group = file.create_group(_REST)
        for i, variable in enumerate(_random_states(model)):
            group[str(i)] = variable.numpy()
        group.attrs["checksum"] = _checksum(model)


def _load_rest(model: keras.Model, path: str) -> None:
    with h5py.File(path, "r") as file:
        group = file[_REST]
        states = _random_states(model)
        if len(group) != len(states):
            raise ValueError(
                f"The model must have {len(group)} random states, as when it "
                f"was saved. Received: {len(states)}"
            )
        for i, variable in enumerate(states):
            variable.assign(group[str(i)][()])
        if group.attrs["checksum"] != _checksum(model):
            raise ValueError(
                "The file must be as it was written. Received: weights with "
                f"another checksum in {path!r}"
            )


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's `keras.random.SeedGenerator`s."""
    weights = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in weights]


def _checksum(model: keras.Model) -> int:
    return saved_state.checksum(v.numpy() for v in model.variables)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # A shared folder.
        os.remove(path)


def _rename(path: str, prefix: str) -> None:
    directory, name = os.path.split(path)
    with contextlib.suppress(FileNotFoundError):  # A shared folder.
        os.replace(path, os.path.join(directory, prefix + name))


def _flush(path: str) -> None:
    """Makes sure that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
