"""Files of backups: their names, and how they are found and removed."""

from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import errno
import os
import re
import shutil
import tempfile
from typing import NamedTuple

import tensorflow as tf

from tf_regtopk.distribute import collectives
from tf_regtopk.log import logger
from tf_regtopk.saving import worker_files

PARTIAL, DAMAGED = "partial.", "damaged."
_DELETED = "epochs.deleted"
# A number has at most 9 digits, because workers tell each other an int32.
_NUMBER = r"(\d{6}|[1-9]\d{6,8})"
# The names of the files that a backup writes, and of no others.
_NAME = re.compile(
    rf"epoch-{_NUMBER}(?:-step-(?!000000){_NUMBER})?"
    r"(?:\.worker-\d+-of-\d+)?\.weights\.h5"
)


class Position(NamedTuple):
    """A point of a training.

    Attributes:
        epoch: The number of whole epochs that were trained.
        step: The number of steps taken of the epoch after them.
    """

    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        steps = f" and {self.step} steps" if self.step else ""
        return f"epoch {self.epoch}{steps}"


class Folder:
    """The folder of the backups of a run, which may hold other files too.

    Args:
        directory: Path of the folder.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def path(self, position: Position) -> str:
        """Path of a backup, without the number of a worker."""
        step = f"-step-{position.step:06d}" if position.step else ""
        name = f"epoch-{position.epoch:06d}{step}.weights.h5"
        return os.path.join(self.directory, name)

    def files(self, prefix: str = "") -> Iterator[tuple[Position, str]]:
        """Position and path of every backup here, of any worker."""
        # Another worker may have removed a folder that they share.
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                match = _NAME.fullmatch(name.removeprefix(prefix))
                path = os.path.join(self.directory, name)
                if name.startswith(prefix) and match and os.path.isfile(path):
                    epoch, step = match.groups(default=0)
                    yield Position(int(epoch), int(step)), path

    def positions_of_all(
        self, strategy: tf.distribute.Strategy
    ) -> list[Position]:
        """The positions that every worker has, the same on each, newest first.

        Raises:
            FileNotFoundError: If there are backups, and none that all have.
        """
        here = sorted({position for position, _ in self.files()})
        loadable = [
            position
            for position in here
            if worker_files.find_files(self.path(position), strategy)
        ]
        # Two at most: the workers are never more than one backup apart.
        none = Position()
        newest = ([none, none] + loadable)[-2:]
        numbers = [number for position in newest for number in position]
        of_all = collectives.gather_from_workers(
            [len(here), *numbers], strategy
        )
        common = set.intersection(
            *(
                {Position(*pair) for pair in row[1:].reshape(-1, 2).tolist()}
                for row in of_all
            )
        )
        positions = sorted(common - {none}, reverse=True)
        # One file without its peers is a first backup cut short: no loss.
        if not positions and max(row[0] for row in of_all) > 1:
            raise FileNotFoundError(
                "The backups must be there of every worker for one of the last "
                f"two positions. Received: in {self.directory!r} those after "
                f"{_describe(here)}, of which this worker can load "
                f"{_describe(loadable)}. Give all workers the folders back; "
                "or, if the run had ended or is to start anew, delete these"
            )
        if here and not positions:
            logger.warning("The first backup was cut short. Starting anew")
        return positions

    @contextlib.contextmanager
    def writing(
        self, position: Position, strategy: tf.distribute.Strategy
    ) -> Iterator[str]:
        """Gives the path to write to; the file gets its name when complete.

        Raises:
            OSError: If the file cannot be written. Those before stay.
        """
        path = worker_files.worker_path(self.path(position), strategy)
        partial = _with_prefix(path, PARTIAL)
        try:
            self._check_free(path)
            yield partial
            _flush(partial)
            os.replace(partial, path)
            _flush(self.directory)
        # Some errors of HDF5 have no number of the system's.
        except (OSError, RuntimeError) as error:
            _remove(partial)
            before = _describe(sorted({p for p, _ in self.files()}))
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"The backup after {position} must fit in the folder and be "
                f"written there, in one piece. Received: {error!r}. Backups "
                f"that are there: after {before}",
                self.directory,
            ) from error

    def _check_free(self, path: str) -> None:
        """Raises unless a file as large as the last one has room.

        HDF5 may end the process where a disk becomes full while a file is
        closed.
        """
        sizes = [
            os.path.getsize(other)
            for _, other in self.files()
            if _worker_of(other) == _worker_of(path)
        ]
        usage = shutil.disk_usage(self.directory)
        # Some network file systems have no numbers.
        if sizes and usage.total and usage.free < max(sizes):
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {max(sizes):,} bytes needed, "
                f"{usage.free:,} free",
                path,
            )

    def check_writable(self) -> None:
        """Raises unless files can be written here.

        Raises:
            OSError: If not.
        """
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(b"0")
        except OSError as error:
            raise OSError(
                error.errno,
                "`directory` of `Backup` must be a folder in which files can "
                f"be written. Received: {error.strerror}",
                self.directory,
            ) from error

    def clean_up(self) -> None:
        """Removes what an earlier run was about to write or to delete."""
        # A link may lead to a folder that is not there yet.
        os.makedirs(os.path.realpath(self.directory), exist_ok=True)
        if os.path.exists(os.path.join(self.directory, _DELETED)):
            self.remove_all()
        for _, path in self.files(PARTIAL):
            _remove(path)

    def keep_only(self, positions: Collection[Position]) -> None:
        """Removes the backups of all other positions."""
        for position, path in self.files():
            if position not in positions:
                _remove(path)

    def remove_after(self, position: Position) -> None:
        """Removes later backups, which some workers had saved and not all."""
        for later, path in self.files():
            if later > position:
                logger.warning("Removing %s, which not all have", path)
                _remove(path)

    def mark_as_damaged(self, positions: Collection[Position]) -> None:
        """Renames the backups of these positions, so that none is loaded."""
        for position, path in self.files():
            if position in positions:
                with contextlib.suppress(FileNotFoundError):  # A shared folder.
                    os.replace(path, _with_prefix(path, DAMAGED))

    def mark_as_deleted(self) -> None:
        """Makes all backups count as deleted, also if this ends midway."""
        with open(os.path.join(self.directory, _DELETED), "w"):
            pass
        _flush(self.directory)

    def remove_all(self) -> None:
        """Removes every file that backups have written here, the mark last."""
        for prefix in ("", PARTIAL, DAMAGED):
            for _, path in self.files(prefix):
                _remove(path)
        _remove(os.path.join(self.directory, _DELETED))

    def remove_if_empty(self) -> None:
        """Removes the folder, unless it is needed or cannot be removed."""
        # A mount point, a link, or a folder with other files in it stays.
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)


def _worker_of(path: str) -> str:
    """The part of a backup's name that is for its worker, empty for one."""
    return os.path.basename(path).partition(".")[2]


def _describe(positions: Collection[Position]) -> str:
    return ", ".join(str(position) for position in positions) or "none"


def _with_prefix(path: str, prefix: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, prefix + name)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # A shared folder.
        os.remove(path)


def _flush(path: str) -> None:
    """Makes sure that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
