"""The board: posts of all launchers, and who takes part in an attempt.

One launcher keeps the board. The managers of Python's `multiprocessing` carry
the posts, unencrypted, and let a launcher take part that proves by a secret
that it may.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import errno
from multiprocessing import managers
import threading
import time
from typing import NamedTuple

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import worker as worker_lib

# A launcher that has said nothing for so many seconds is gone.
SILENT_SECONDS = 15.0
BEAT_SECONDS = 0.2
# Seconds in which further machines may come once there are enough.
LAST_CALL_SECONDS = 5.0
_METHODS = ("exchange",)
# Exit statuses of launchers that end a training: for others to go on would be
# to begin it anew, or to fail in the same way.
_END_OF_TRAINING = (
    0,
    bootstrap.FAILED,
    bootstrap.LOST_A_WORKER,
    bootstrap.PORT_TAKEN,
)


@dataclasses.dataclass(frozen=True)
class Post:
    """A launcher's state, for the others to read.

    Args:
        launcher: Text that no other launcher process has.
        attempt: Number of the attempt that the launcher is at, or waits for.
        members: The launchers that take part in it, once they have met.
        addresses: Those of its workers in this attempt, "host:port".
        failures: The failures of its workers, None while they run.
        before: Its failures in the attempt before, None if it took no part.
        status: The exit status of a launcher that is about to end.
        machines: Names of the machines as the launcher was told, or else the
            least and the most of them. Those of all launchers must be equal.
        num_restarts: Number of restarts so far.
        max_restarts: Number of restarts that the launcher allows.
    """

    launcher: str
    attempt: int = -1
    members: frozenset[str] = frozenset()
    addresses: tuple[str, ...] = ()
    failures: tuple[worker_lib.Failure, ...] | None = None
    before: tuple[worker_lib.Failure, ...] | None = None
    status: int | None = None
    machines: tuple[str, ...] | tuple[int, int] = (1, 1)
    num_restarts: int = 0
    max_restarts: int = 0

    @property
    def told(self) -> tuple[object, int | None]:
        """The machines and the restarts that all must be told alike.

        Where no machine may leave, the others would wait for the one whose
        launcher ends, because it allows fewer restarts.
        """
        least, most = self.least_and_most
        return self.machines, self.max_restarts if least == most else None

    @property
    def has_left(self) -> bool:
        """True if the launcher is about to end."""
        return self.status is not None

    @property
    def least_and_most(self) -> tuple[int, int]:
        """The numbers of machines with which an attempt may begin."""
        if isinstance(self.machines[0], str):
            return len(self.machines), len(self.machines)
        return self.machines


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The launchers that take part in an attempt.

    Args:
        attempt: Number of the attempt; -1 before the first.
        posts: Dict from the names of their machines to their posts.
    """

    attempt: int = -1
    posts: Mapping[str, Post] = dataclasses.field(default_factory=dict)

    def has(self, launcher: str) -> bool:
        """True if a launcher takes part."""
        return any(post.launcher == launcher for post in self.posts.values())

    def status_if_over(self, posts: Iterable[Post]) -> int | None:
        """The status of those that took part, None unless all have ended.

        Args:
            posts: The posts of all that have been heard of lately.
        """
        members = [post for post in posts if self.has(post.launcher)]
        least, most = next(iter(self.posts.values()), Post("")).least_and_most
        if least == most or not all(post.has_left for post in members):
            return None
        # Those that a signal has ended leave the training to others.
        statuses = [post.status for post in members if post.status is not None]
        return min((s for s in statuses if s in _END_OF_TRAINING), default=None)


_NOBODY = Gathering()


class Board:
    """The posts of all machines, and who takes part in the newest attempt."""

    def __init__(self) -> None:
        self._posts: dict[str, _Pinned] = {}
        self._gathering = Gathering()
        self._lock = threading.Lock()

    def exchange(
        self, machine: str, post: Post, known: Gathering = _NOBODY
    ) -> tuple[dict[str, tuple[Post, float]], Gathering] | None:
        """Puts a machine's post up, and returns all with their ages.

        Args:
            machine: Name of the machine.
            post: Its `Post`, in place of an earlier one.
            known: The newest `Gathering` that the machine knows. A board that
                is begun anew learns from it who has met on the one before.

        Returns:
            A dict from the names of machines to `(post, seconds since then)`,
            and the newest `Gathering`; or None if another launcher uses the
            name.
        """
        now = time.monotonic()
        with self._lock:
            earlier = self._posts.get(machine)
            arrived = now
            if earlier and earlier.post.launcher != post.launcher:
                is_alive = now - earlier.since < BEAT_SECONDS * 10
                if is_alive and not earlier.post.has_left:
                    return None
            elif earlier and earlier.post.attempt == post.attempt:
                arrived = earlier.arrived
            self._posts[machine] = _Pinned(post, now, arrived)
            if known.attempt > self._gathering.attempt:
                self._gathering = known
            self._gather(now)
            posts = {
                name: (pinned.post, now - pinned.since)
                for name, pinned in self._posts.items()
            }
            return posts, self._gathering

    def _gather(self, now: float) -> None:
        """Settles who takes part in the next attempt, once all are there."""
        heard_of = {
            name: pinned
            for name, pinned in self._posts.items()
            if now - pinned.since < SILENT_SECONDS
        }
        here = {
            name: pinned
            for name, pinned in heard_of.items()
            if not pinned.post.has_left
        }
        if self._gathering.posts:
            # Who comes with other numbers is refused, and stops nobody.
            [told] = {p.told for p in self._gathering.posts.values()}
            here = {k: v for k, v in here.items() if v.post.told == told}
        if len({pinned.post.told for pinned in here.values()}) != 1:
            return
        status = self._gathering.status_if_over(
            p.post for p in heard_of.values()
        )
        if status is not None:
            return
        attempt = max(pinned.post.attempt for pinned in here.values())
        if attempt <= self._gathering.attempt or any(
            # Some are still at the attempt before, or are at this one already.
            pinned.post.attempt < attempt or pinned.post.members
            for pinned in here.values()
        ):
            return
        least, most = next(iter(here.values())).post.least_and_most
        last = max(pinned.arrived for pinned in here.values())
        if len(here) >= most or (
            len(here) >= least and now - last > LAST_CALL_SECONDS
        ):
            # Those that took part before come first, others wait.
            names = sorted(
                here,
                key=lambda n: (
                    not self._gathering.has(here[n].post.launcher),
                    n,
                ),
            )[:most]
            self._gathering = Gathering(
                attempt, {name: here[name].post for name in sorted(names)}
            )


class _Pinned(NamedTuple):
    """A post on the board, when it was put up, and when its launcher came."""

    post: Post
    since: float
    arrived: float


class Manager(managers.BaseManager):
    """The board of another process."""


Manager.register("board", exposed=_METHODS)


def keep_board(address: tuple[str, int], secret: bytes) -> bool:
    """Keeps a board in this process, for as long as the process runs.

    Args:
        address: Host and port to listen at.
        secret: What others must know.

    Returns:
        False if the address is of another machine, or another process of this
        machine listens there: presumably the launcher that keeps the board.
    """
    board = Board()

    class Keeper(managers.BaseManager):
        pass

    Keeper.register("board", callable=lambda: board, exposed=_METHODS)
    try:
        server = Keeper(address, secret).get_server()
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return False
        raise
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return True
