"""The rendezvous: launchers of several machines agree on one training.

Each launcher has a post on a board that one of them keeps, and reads those of
all.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import threading
import time
import uuid

from tf_regtopk.launch import board as board_lib
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import worker as worker_lib

# Seconds that the keeper of the board waits for the others to read the end.
_FAREWELL_SECONDS = 5.0
# Seconds in which one that was started again may find its name taken.
_NAME_SECONDS = 5.0


class TrainingOverError(Exception):
    """The others have ended the training.

    Args:
        status: Their exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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


class Member:
    """This launcher among those of all machines.

    Args:
        machine: Name of this machine.
        machines: Names of all machines, in which order their workers are
            numbered; or the least and the most of machines, then in the order
            of the names of those that came.
        address: Host and port of the board.
        secret: What proves that this launcher may take part.
        max_restarts: Number of restarts that this launcher allows.
    """

    def __init__(
        self,
        machine: str,
        machines: tuple[str, ...] | tuple[int, int],
        address: tuple[str, int],
        secret: bytes,
        max_restarts: int = 0,
    ) -> None:
        self._machine = machine
        self._address, self._secret = address, secret
        self._post = board_lib.Post(
            str(uuid.uuid4()), machines=machines, max_restarts=max_restarts
        )
        self._members: list[str] = []
        self._gathering = board_lib.Gathering()
        self._others: dict[str, tuple[board_lib.Post, float]] = {}
        self._error: Exception | None = None
        self._num_exchanges, self._heard_at = 0, -math.inf
        self._exchanged = threading.Condition()
        self._keeps_board = board_lib.keep_board(address, secret)
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
            self._post = board_lib.Post(
                launcher,
                attempt,
                addresses=tuple(addresses),
                before=before,
                machines=self._post.machines,
                num_restarts=num_restarts,
                max_restarts=self._post.max_restarts,
            )
            self._wait_for_news()
            self._check_told()
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

    def _take_part(self, posts: Mapping[str, board_lib.Post]) -> Meeting:
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
        self, machine: str, post: board_lib.Post, age: float
    ) -> Sequence[worker_lib.Failure] | None:
        if post.attempt == self._post.attempt and post.failures is not None:
            return post.failures
        if post.attempt == self._post.attempt + 1 and post.before is not None:
            return post.before  # It waits for the next attempt already.
        if post.attempt > self._post.attempt:
            what = "was started again"
        elif post.has_left:
            what = "has left, because its launcher was ended"
        elif age > board_lib.SILENT_SECONDS:
            what = f"has not been heard of for {age:.0f} s"
        else:
            return None
        least, most = self._post.least_and_most
        is_leaving = post.status == bootstrap.BACKED_UP and least < most
        return [worker_lib.Failure(machine, what, is_leaving=is_leaving)]

    def _heard_of(self) -> dict[str, board_lib.Post]:
        """The posts of the other machines that have been heard of lately."""
        return {
            name: post
            for name, (post, since) in self._others.items()
            if _age(since) < board_lib.SILENT_SECONDS
        }

    def _present(self) -> dict[str, board_lib.Post]:
        """The posts of the other machines that take part or wait."""
        return {k: v for k, v in self._heard_of().items() if not v.has_left}

    def _check_told(self) -> None:
        # The error is that of the one that comes later.
        if self._gathering.has(self._post.launcher):
            return
        for name, post in self._heard_of().items():
            if post.machines != self._post.machines:
                raise ValueError(
                    "All launchers must be told the same machines. Received: "
                    f"{self._post.machines} here, {post.machines} on {name}"
                )
            if post.told != self._post.told:
                raise ValueError(
                    "All launchers must be told the same `--max_restarts`. "
                    f"Received: {self._post.max_restarts} here, "
                    f"{post.max_restarts} on {name}"
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
        return _age(self._heard_at) < board_lib.SILENT_SECONDS

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
        if (
            _age(max(self._heard_at, self._connected_at))
            > board_lib.SILENT_SECONDS
        ):
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
                    manager = board_lib.Manager(self._address, self._secret)
                    manager.connect()
                    board = manager.board()  # type: ignore[attr-defined]
                answer = board.exchange(
                    self._machine, self._post, self._gathering
                )
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
            time.sleep(board_lib.BEAT_SECONDS)

    def _take_over_board(self) -> None:
        """Keeps the board where another launcher of this machine has left."""
        with contextlib.suppress(OSError):
            if not self._keeps_board:
                self._keeps_board = board_lib.keep_board(
                    self._address, self._secret
                )

    def _hear(
        self,
        answer: tuple[
            dict[str, tuple[board_lib.Post, float]], board_lib.Gathering
        ]
        | None,
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


def _next_attempt(post: board_lib.Post, launcher: str) -> int:
    """Returns the first attempt in which a launcher can join another's."""
    # One that was started again interrupts the others, which may not have
    # noticed that the one before it has gone.
    takes_part = not post.members or launcher in post.members
    return post.attempt + (not takes_part)


def _age(since: float) -> float:
    return time.monotonic() - since
