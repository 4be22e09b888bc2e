"""The rendezvous: launchers of several machines agree on one training.

Each launcher has a post on a board that one of them keeps, and reads those of
all. What carries the posts are the managers of Python's `multiprocessing`, to
which a launcher proves by a secret that it may take part. What they carry is
not encrypted.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import errno
import itertools
import math
import multiprocessing
from multiprocessing import managers
import threading
import time
from typing import NamedTuple
import uuid

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import worker as worker_lib

# A launcher that has said nothing for so many seconds is gone.
SILENT_SECONDS = 15.0
_BEAT_SECONDS = 0.2
# Seconds that the keeper of the board waits for the others to read the end.
_FAREWELL_SECONDS = 5.0
# Seconds in which one that was started again may find its name taken.
_NAME_SECONDS = 5.0
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

    @property
    def has_left(self) -> bool:
        """Whether the launcher is about to end."""
        return self.status is not None

    @property
    def least_and_most(self) -> tuple[int, int]:
        """The numbers of machines with which an attempt may begin."""
        if isinstance(self.machines[0], str):
            return len(self.machines), len(self.machines)
        return self.machines


class TrainingOverError(Exception):
    """The others have ended the training.

    Args:
        status: Their exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Gathering:
    """Those that take part in an attempt.

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


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The machines of an attempt, once all are there.

    Args:
        addresses: Addresses of all workers.
        first: Number of the first worker of this machine.
        num_restarts: Number of restarts so far, the most of any launcher:
            another may have been started again itself.
    """

    addresses: tuple[str, ...]
    first: int
    num_restarts: int


class Board:
    """The posts of all machines, and who takes part in the newest attempt."""

    def __init__(self) -> None:
        self._posts: dict[str, _Pinned] = {}
        self._gathering = Gathering()
        self._lock = threading.Lock()

    def exchange(
        self, machine: str, post: Post
    ) -> tuple[dict[str, tuple[Post, float]], Gathering] | None:
        """Puts a machine's post up, and returns all with their ages.

        Args:
            machine: Name of the machine.
            post: Its `Post`, in place of an earlier one.

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
                is_alive = now - earlier.since < _BEAT_SECONDS * 10
                if is_alive and not earlier.post.has_left:
                    return None
            elif earlier and earlier.post.attempt == post.attempt:
                arrived = earlier.arrived
            self._posts[machine] = _Pinned(post, now, arrived)
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
        before = next(iter(self._gathering.posts.values()), None)
        here = {
            name: pinned
            for name, pinned in heard_of.items()
            if not pinned.post.has_left
            and (not before or pinned.post.machines == before.machines)
        }
        status = self._gathering.status_if_over(
            p.post for p in heard_of.values()
        )
        if status is not None:
            return
        attempt = max((p.post.attempt for p in here.values()), default=-1)
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


class _Manager(managers.BaseManager):
    """The board of another process."""


_Manager.register("board", exposed=_METHODS)


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


class Member:
    """This launcher among those of all machines.

    Args:
        machine: Name of this machine.
        machines: Names of all machines, in which order their workers are
            numbered; or the least and the most of machines, then in the order
            of the names of those that came.
        address: Host and port of the board.
        secret: What proves that this launcher may take part.
    """

    def __init__(
        self,
        machine: str,
        machines: tuple[str, ...] | tuple[int, int],
        address: tuple[str, int],
        secret: bytes,
    ) -> None:
        self._machine = machine
        self._address, self._secret = address, secret
        self._post = Post(str(uuid.uuid4()), machines=machines)
        self._members: list[str] = []
        self._gathering = Gathering()
        self._others: dict[str, tuple[Post, float]] = {}
        self._error: Exception | None = None
        self._num_exchanges, self._heard_at = 0, -math.inf
        self._exchanged = threading.Condition()
        self._keeps_board = keep_board(address, secret)
        self._reach_board()

    def meet(
        self,
        addresses: Sequence[str],
        timeout: float,
        num_restarts: int = 0,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Meeting:
        """Waits until all machines are there for the next attempt.

        Args:
            addresses: Those of the workers of this machine.
            timeout: Seconds to wait. Where others may come and go, these begin
                when no attempt of others is under way.
            num_restarts: Number of restarts of this launcher so far.
            on_wait: Function to call if an attempt of others is under way.

        Returns:
            The `Meeting` of all.

        Raises:
            TimeoutError: If some do not come. The message says which.
            TrainingOverError: If others have ended the training meanwhile.
            ValueError: If the secret is another than that of the board.
        """
        deadline = time.monotonic() + timeout
        launcher, before = self._post.launcher, self._post.failures
        attempt = self._post.attempt + 1
        has_waited = False
        while True:
            self._post = Post(
                launcher,
                attempt,
                addresses=tuple(addresses),
                before=before,
                machines=self._post.machines,
                num_restarts=num_restarts,
            )
            self._wait_for_news()
            self._check_machines()
            gathering = self._gathering
            posts = [self._post, *self._heard_of().values()]
            status = gathering.status_if_over(posts)
            if status is not None:
                raise TrainingOverError(status)
            if gathering.attempt == attempt and gathering.has(launcher):
                return self._take_part(gathering.posts)
            posts = [self._post, *self._present().values()]
            attempt = max(
                gathering.attempt + 1,
                *(_next_attempt(post, launcher) for post in posts),
            )
            least, most = self._post.least_and_most
            has_begun = any(
                post.members and launcher not in post.members for post in posts
            )
            if least < most and has_begun:
                deadline = time.monotonic() + timeout
                if not has_waited:
                    on_wait()
                has_waited = True
            if time.monotonic() > deadline:
                raise TimeoutError(self._who_is_missing(timeout))

    def _take_part(self, posts: Mapping[str, Post]) -> Meeting:
        """Begins the attempt for which these have met."""
        named = [each for each in self._post.machines if isinstance(each, str)]
        self._members = named or list(posts)
        of_all = [posts[name] for name in self._members]
        members = frozenset(post.launcher for post in of_all)
        self._post = dataclasses.replace(self._post, members=members)
        before = of_all[: self._members.index(self._machine)]
        return Meeting(
            tuple(itertools.chain(*(post.addresses for post in of_all))),
            sum(len(post.addresses) for post in before),
            max(post.num_restarts for post in of_all),
        )

    def newcomers(self) -> list[str]:
        """Returns the machines that wait for a place which there is."""
        _, most = self._post.least_and_most
        return sorted(
            name
            for name, post in self._present().items()
            if name not in self._members
            and post.attempt > self._post.attempt
            and len(self._members) < most
        )

    def failures_elsewhere(self) -> list[worker_lib.Failure]:
        """Returns the failures of the other machines in this attempt."""
        return [f for outcome in self._outcomes() for f in outcome or ()]

    def settle(
        self, failures: Sequence[worker_lib.Failure]
    ) -> list[worker_lib.Failure]:
        """Tells how the attempt has ended here, and waits for the others.

        Args:
            failures: Those of this machine's workers.

        Returns:
            The failures of all machines.
        """
        self._post = dataclasses.replace(self._post, failures=tuple(failures))
        while None in (outcomes := self._outcomes()):
            self._wait_for_news()
        return [*failures, *(f for outcome in outcomes for f in outcome or ())]

    def leave(self, status: int) -> None:
        """Tells that this launcher ends, and lets the others read its post.

        Args:
            status: Its exit status.
        """
        self._post = dataclasses.replace(self._post, status=status)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        # Who may not take part has said so before.
        with contextlib.suppress(ValueError):
            while True:
                self._wait_for_news()
                others_left = all(p.has_left for p, _ in self._others.values())
                if (
                    not self._keeps_board
                    or others_left
                    or time.monotonic() > deadline
                ):
                    return

    def _outcomes(self) -> list[Sequence[worker_lib.Failure] | None]:
        """The failures of each other machine, None while its workers run."""
        if not self._is_heard():
            return [[worker_lib.Failure("the rendezvous", self._no_answer())]]
        return [
            self._outcome(name, post, _age(since))
            for name, (post, since) in self._others.items()
            if name in self._members
        ]

    def _outcome(
        self, machine: str, post: Post, age: float
    ) -> Sequence[worker_lib.Failure] | None:
        if post.attempt == self._post.attempt and post.failures is not None:
            return post.failures
        if post.attempt == self._post.attempt + 1 and post.before is not None:
            return post.before  # It waits for the next attempt already.
        if post.attempt > self._post.attempt:
            what = "was started again"
        elif post.has_left:
            what = "has left, because its launcher was ended"
        elif age > SILENT_SECONDS:
            what = f"has not been heard of for {age:.0f} s"
        else:
            return None
        least, most = self._post.least_and_most
        is_leaving = post.status == bootstrap.BACKED_UP and least < most
        return [worker_lib.Failure(machine, what, is_leaving=is_leaving)]

    def _heard_of(self) -> dict[str, Post]:
        """The posts of the other machines that have been heard of lately."""
        return {
            name: post
            for name, (post, since) in self._others.items()
            if _age(since) < SILENT_SECONDS
        }

    def _present(self) -> dict[str, Post]:
        """Of these the posts of those that have not left."""
        return {k: v for k, v in self._heard_of().items() if not v.has_left}

    def _check_machines(self) -> None:
        # The error is that of the one that comes later.
        if self._gathering.has(self._post.launcher):
            return
        for name, post in self._heard_of().items():
            if post.machines != self._post.machines:
                raise ValueError(
                    "All launchers must be told the same machines. Received: "
                    f"{self._post.machines} here, {post.machines} on {name}"
                )

    def _who_is_missing(self, timeout: float) -> str:
        names = [self._machine, *self._present()]
        missing = [
            each
            for each in self._post.machines
            if isinstance(each, str) and each not in names
        ]
        return (
            f"{self._post.least_and_most[0]} machines must be there within "
            f"{timeout:g} s (`--start_timeout`). Received: "
            + ", ".join(sorted(names))
            + (f". Missing: {', '.join(missing)}" if missing else "")
            + (
                ""
                if self._is_heard()
                else f". No board: it {self._no_answer()}"
            )
        )

    def _is_heard(self) -> bool:
        """True unless the board has not answered for a while."""
        return _age(self._heard_at) < SILENT_SECONDS

    def _no_answer(self) -> str:
        return f"does not answer at {self._board_address}"

    @property
    def _board_address(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _reach_board(self) -> None:
        """Begins to exchange posts with the board, over a new connection."""
        self._connected_at = time.monotonic()
        self._thread = threading.Thread(target=self._keep_in_touch, daemon=True)
        self._thread.start()

    def _wait_for_news(self) -> None:
        """Waits for an exchange that has begun after this call, or a while."""
        # A connection to a machine that is gone may wait without end.
        if _age(max(self._heard_at, self._connected_at)) > SILENT_SECONDS:
            self._reach_board()
        with self._exchanged:
            end = self._num_exchanges + 2
            self._exchanged.wait_for(
                lambda: self._num_exchanges >= end or self._error, 2.0
            )
        if self._error:
            raise self._error

    def _keep_in_touch(self) -> None:
        board, named_at = None, time.monotonic()
        this_thread = threading.current_thread()
        while self._error is None and self._thread is this_thread:
            error, answer = None, None
            try:
                if board is None:
                    manager = _Manager(self._address, self._secret)
                    manager.connect()
                    board = manager.board()  # type: ignore[attr-defined]
                answer = board.exchange(self._machine, self._post)
                if answer is not None:
                    named_at = time.monotonic()
                elif _age(named_at) > _NAME_SECONDS:
                    error = ValueError(
                        "Each machine must have a name of its own (`--host`). "
                        f"Received: {self._machine}, which another launcher has"
                    )
            except multiprocessing.AuthenticationError:
                error = ValueError(
                    "The secret must be the same on all machines. Received: "
                    f"another than that of {self._board_address}"
                )
            except (OSError, EOFError):
                board, named_at = None, time.monotonic()
                self._take_over_board()
            except Exception as other:  # As of another version's launcher.
                error = ValueError(
                    f"{self._board_address} must be the rendezvous of this "
                    f"version. Received: {type(other).__name__}: {other}"
                )
            if self._thread is this_thread:
                self._hear(answer, error)
            time.sleep(_BEAT_SECONDS)

    def _take_over_board(self) -> None:
        """Keeps the board where another launcher of this machine has left."""
        with contextlib.suppress(OSError):
            if not self._keeps_board:
                self._keeps_board = keep_board(self._address, self._secret)

    def _hear(
        self,
        answer: tuple[dict[str, tuple[Post, float]], Gathering] | None,
        error: Exception | None,
    ) -> None:
        with self._exchanged:
            if answer is not None:
                posts, self._gathering = answer
                now = self._heard_at = time.monotonic()
                # A board that was begun anew does not know all at once.
                self._others = self._others | {
                    name: (post, now - age)
                    for name, (post, age) in posts.items()
                    if name != self._machine
                }
                self._num_exchanges += 1
            self._error = error
            self._exchanged.notify_all()


def _next_attempt(post: Post, launcher: str) -> int:
    """Returns the first attempt in which a launcher can join another's."""
    # One that was started again interrupts the others, which may not have
    # noticed that the one before it has gone.
    takes_part = not post.members or launcher in post.members
    return post.attempt + (not takes_part)


def _age(since: float) -> float:
    return time.monotonic() - since
