"""Saving a run so that it can be stopped, resumed and resized."""

import os
import signal
from typing import Any
from typing import NoReturn

import keras
import numpy as np

from tf_regtopk import validation
from tf_regtopk.callbacks import backup_contents
from tf_regtopk.callbacks import backup_files
from tf_regtopk.callbacks import backup_replicas
from tf_regtopk.callbacks import load_scope
from tf_regtopk.callbacks import of_models
from tf_regtopk.callbacks import sigterm
from tf_regtopk.callbacks import skipped_steps
from tf_regtopk.distribute import collectives
from tf_regtopk.launch import notes
from tf_regtopk.log import logger


class Backup(keras.callbacks.Callback):
    """Backs up the whole training after every epoch, and resumes it.

    `fit` then goes on to the bit as if it had not been interrupted: weights,
    optimizer, every replica's residual error, and the random states of dropout
    and the like, which Keras's ways of saving leave out. Every worker gives the
    same folder, whether or not they share a disk, and writes its own files; the
    workers agree on the newest backup that all of them can load. Another number
    of workers or replicas can go on, if it can read the files of all. A file
    gets its name once it is complete, and the backup before stays: training
    goes on from there where the newest file is damaged. Replicas whose weights
    have drifted apart end the training with an error. (Those of
    `DecentralizedOptimizer` have weights of their own, and each replica's are
    saved.) Callbacks that change or record the training at the end of an epoch
    come before this one.

    SIGTERM, by which Slurm, Kubernetes and others announce that they take a
    machine away, ends `fit` after a backup in the middle of the epoch: if one
    worker gets SIGTERM, all workers agree on a step within about a second, back
    up there, and raise `SystemExit(143)`. A second SIGTERM ends the process at
    once. A handler of SIGTERM that the user has set stays.

    Args:
        directory: Path of a folder, the same on every worker. Other files in
            the folder stay as they are.
        every_steps: Integer n, or None. Also backs up in the middle of an
            epoch, after its steps n, 2n, ...

    Raises:
        TypeError: If `every_steps` is no integer.
        ValueError: If `every_steps` is not positive.

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
    give in epoch n what it gave in epoch n before. In the middle of an epoch
    too it begins with the epoch's first batch: the batches of the steps that
    were taken are read and dropped, and the metrics go on from where they were.
    Other callbacks see these steps too, with empty logs.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_steps: int | None = None,
    ) -> None:
        super().__init__()
        if every_steps is not None:
            validation.check_integer("every_steps", every_steps, 1)
        self.directory = os.fspath(directory)
        self.every_steps = every_steps
        self._folder = backup_files.Folder(self.directory)
        self._request = sigterm.Request()
        self._checks: sigterm.Checks | None = None
        self._restored: keras.Model | None = None
        self._next_epoch: int | None = None
        # The last backup, and the state of the epoch that it was in.
        self._last = backup_files.Position()
        self._begun: backup_contents.EpochState | None = None
        # Of the present epoch: executions that have begun, and those skipped.
        self._num_executions = 0
        self._skipped: skipped_steps.SkippedSteps | None = None

    def restore(self, model: keras.Model) -> int:
        """Loads the newest backup, if there is any. To be called before `fit`.

        Args:
            model: The compiled `keras.Model`, built and in the scope of its
                strategy. Optimizers that are attributes of the model, as in a
                GAN, must be built as well.

        Returns:
            Number of the epoch to go on with, for `initial_epoch`. `fit` skips
            the steps of this epoch that were taken before the backup.

        Raises:
            FileNotFoundError: If the backups of some workers are missing.
            ValueError: If they cannot be loaded, or differ in their weights.
        """
        notes.write("backup", os.path.abspath(self.directory))
        of_models.all_of_model(model)  # Builds that of `compile`.
        self._folder.clean_up()
        self._last = self._load_newest(model)
        _check_workers_agree(model)
        self._folder.remove_after(self._last)
        self._restored, self._next_epoch = model, self._last.epoch
        self._checks = sigterm.Checks(model.distribute_strategy)
        return self._last.epoch

    def _load_newest(self, model: keras.Model) -> backup_files.Position:
        """Loads the newest backup that all workers can, and says which."""
        strategy = model.distribute_strategy
        refused: dict[backup_files.Position, Exception] = {}
        self._begun = None
        for position in self._folder.positions_of_all(strategy):
            error = self._load(position, model)
            # All workers go on from the same backup.
            could = collectives.gather_from_workers(
                [int(error is None)], strategy
            )[:, 0]
            if not could.all():
                refused[position] = error or ValueError(
                    "The backups of all replicas must be as they were written. "
                    f"Received: for {position} others at the replicas "
                    f"{np.flatnonzero(could == 0).tolist()}, whose logs say why"
                )
                continue
            try:
                _check_workers_agree(model)
            except ValueError as not_the_same:
                refused[position] = not_the_same
                continue
            logger.info("Resuming %s after %s", self.directory, position)
            self._keep_damaged(refused, position)
            return position
        if len(refused) > 1:
            raise ValueError(
                "One of the last two backups must be of a run with this model "
                "and these arguments, and as it was written, on all workers: "
                "give the arguments of that run, or good files back; or, if "
                "the run is to start anew, delete these. Received: in "
                f"{self.directory!r} those {self._reasons(refused)}"
            )
        for error in refused.values():
            raise error
        return backup_files.Position()

    def _reasons(self, refused: dict[backup_files.Position, Exception]) -> str:
        """Says why backups were refused; a reason of several only once."""
        alike: dict[str, list[backup_files.Position]] = {}
        for position, error in refused.items():
            # Reasons are alike, though each names a file of its own.
            reason = str(error).replace(self._folder.path(position), "")
            alike.setdefault(reason, []).append(position)
        return "; ".join(
            f"{' and '.join(f'after {p}' for p in positions)}: "
            f"{refused[positions[0]]}"
            for positions in alike.values()
        )

    def _load(
        self, position: backup_files.Position, model: keras.Model
    ) -> Exception | None:
        """Loads a backup, or returns why not."""
        try:
            with load_scope.load_scope(
                self._folder.path(position), model.distribute_strategy, model
            ) as path:
                self._begun = backup_contents.load(model, path)
        except (FileNotFoundError, ValueError) as error:
            return error
        return None

    def _keep_damaged(
        self,
        refused: dict[backup_files.Position, Exception],
        position: backup_files.Position,
    ) -> None:
        """Renames the files that were refused, and says which and why."""
        self._folder.mark_as_damaged(refused)
        for damaged, error in refused.items():
            logger.warning(
                "Resuming %s after %s, because the backup of %s cannot be "
                'loaded (kept as "%s..."): %s',
                self.directory,
                position,
                damaged,
                backup_files.DAMAGED,
                error,
            )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._restored is None or self._restored is not self.model:
            raise ValueError(
                "`Backup.restore(model)` must be called before `fit`, and its "
                "result be given as `initial_epoch`"
            )
        # Not after an epoch, which would be lost.
        self._folder.check_writable()
        if self._request.await_in(self._restored.fit):
            notes.write("can_back_up", "while fit runs")

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        notes.remove("can_back_up")
        self._request.stop()
        if self._request.is_made:  # After the last backup.
            self._tell_launcher()
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if epoch != self._next_epoch:
            raise ValueError(
                "`initial_epoch` must be what `Backup.restore` has returned, "
                f"or the number of epochs trained since, {self._next_epoch}. "
                f"Received: initial_epoch={epoch}"
            )
        self._num_executions, self._skipped = 0, None
        if self._begun:
            self._skipped = skipped_steps.SkippedSteps(
                self.model, self._begun, self._num_steps
            )
            self._begun = None

    # Here and not in `on_train_batch_end`, for which Keras would wait for the
    # results of each step; and here more steps are to come.
    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # What `batch` is depends on the version of Keras.
        num_done, num_skipped = self._num_executions, 0
        self._num_executions += 1
        if self._skipped:
            num_skipped = self._skipped.num_executions
            if num_done < num_skipped:
                self._skipped.skip(num_done)
        if num_done > num_skipped:
            self._after_execution(num_done)

    def _after_execution(self, num_done: int) -> None:
        """Backs up if it is time to, or if a worker was asked to end."""
        num_steps = self.model.steps_per_execution
        step = num_done * num_steps
        every = self.every_steps
        is_due = every is not None and step % every < num_steps
        assert self._checks is not None
        ends = self._checks.after_steps(num_steps, self._request.is_made)
        if is_due or ends:
            assert self._next_epoch is not None
            self._back_up(backup_files.Position(self._next_epoch, step))
        if ends:
            self._end()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._back_up(backup_files.Position(epoch + 1))
        self._next_epoch = epoch + 1
        assert self._checks is not None
        if self._checks.now(self._request.is_made):
            self._end()

    def _back_up(self, position: backup_files.Position) -> None:
        """Saves the model, and removes backups that are needed no more."""
        backup_replicas.check(self.model)
        begun, strategy = None, self.model.distribute_strategy
        if position.step:
            begun = backup_contents.epoch_state(
                self.model, position.step, self._num_steps
            )
        with self._folder.writing(position, strategy) as path:
            backup_contents.save(self.model, path, begun)
        # All workers have saved the backup before: they met since.
        needed = {position, self._last}
        if self._last > position:
            # That one counted other steps, and would seem to be newer.
            collectives.gather_from_workers([0], strategy)
            needed = {position}
        self._folder.keep_only(needed)
        self._last = position
        notes.write("saved", str(position))

    def _end(self) -> NoReturn:
        """Ends the training, which was backed up, when all workers do."""
        # No worker leaves while another one still saves.
        collectives.gather_from_workers([0], self.model.distribute_strategy)
        logger.warning(
            "SIGTERM: this training is backed up after %s, and ends",
            self._last,
        )
        self._tell_launcher()
        self._request.stop()
        raise SystemExit(sigterm.ENDED_BY_SIGTERM)

    def _tell_launcher(self) -> None:
        notes.write(
            "backed_up", f"epoch {self._last.epoch}, step {self._last.step}"
        )

    @property
    def _num_steps(self) -> int:
        """The number of steps of an epoch, 0 if unknown."""
        return (self.params or {}).get("steps") or 0

    def delete(self) -> None:
        """Deletes the backups, all at once, when all workers are done.

        To be called by every worker. It waits for the others. The folder goes
        as well, if nothing else is in it and it can be removed.
        """
        if self._restored is None:
            raise ValueError("`Backup.restore(model)` must be called first")
        strategy = self._restored.distribute_strategy
        collectives.gather_from_workers([0], strategy)
        self._folder.mark_as_deleted()
        # Nobody needs the folder of several workers for that any more.
        collectives.gather_from_workers([0], strategy)
        self._folder.remove_all()
        self._folder.remove_if_empty()


def _check_workers_agree(model: keras.Model) -> None:
    """Raises unless all workers go on from the same step and weights."""
    moments = [optimizer.moment for optimizer in of_models.all_of_model(model)]
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
