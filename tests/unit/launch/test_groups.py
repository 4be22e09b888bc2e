"""Launchers of several machines, played by addresses of this one."""

import dataclasses
import json
import re
import signal
import socket
import textwrap
import threading
import time

import pytest
import script_launcher

from tf_regtopk.launch import board
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import command
from tf_regtopk.launch import hosts
from tf_regtopk.launch import rendezvous
from tf_regtopk.launch import shares

LIMIT = 90
HOSTS = "127.0.0.1,127.0.0.2:2"


class Machines:
    """Launchers of the hosts 127.0.0.1, ..., with a folder that all see."""

    def __init__(self, path):
        self._path = path
        [self._port] = shares.free_ports(1, "127.0.0.1")
        self.script = path / "script.py"
        self.launchers = {}

    def write(self, script):
        prelude = f"folder = {str(self._path)!r}\n" + script_launcher.PRELUDE
        self.script.write_text(
            prelude + "folder = pathlib.Path(folder)\n"
            # What an attempt has for itself, and all of its workers know.
            "workers = config['cluster']['worker']\n"
            "run = folder / '-'.join(workers).replace(':', '-')\n"
            "run.mkdir(exist_ok=True)\n" + textwrap.dedent(script),
            "utf-8",
        )

    def start(self, number, *options, hosts=HOSTS, secret="s", arguments=()):
        host = f"127.0.0.{number}"
        where = (f"--hosts={hosts}",)
        if hosts is None:
            where = (f"--rendezvous={self.board}",)
        self.launchers[number] = script_launcher.start(
            *where,
            f"--rendezvous_port={self._port}",
            f"--host={host}",
            *options,
            self.script,
            *arguments,
            TF_REGTOPK_SECRET=secret,
        )
        return self.launchers[number]

    def start_elastic(self, nodes, *numbers):
        """Starts launchers, of which the first keeps the board."""
        started = []
        for number in numbers:
            started.append(
                self.start(
                    number, f"--nodes={nodes}", "--max_restarts=1", hosts=None
                )
            )
            self.wait_for_board()
        return started

    @property
    def board(self):
        return f"127.0.0.1:{self._port}"

    def wait(self):
        """The statuses and outputs of all launchers, by number."""
        outputs = {}
        for number, launcher in self.launchers.items():
            timer = threading.Timer(LIMIT, launcher.kill)
            timer.start()
            outputs[number], _ = launcher.communicate()
            timer.cancel()
        return {n: x.returncode for n, x in self.launchers.items()}, outputs

    def wait_for_board(self):
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def wait_for(self, name):
        deadline = time.monotonic() + LIMIT
        while not [*self._path.glob(name)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    yield machines
    for launcher in machines.launchers.values():
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()


def test_workers_of_all_machines(machines, tmp_path):
    machines.write("""
    meet(run)
    (folder / f"config-{number}").write_text(os.environ["TF_CONFIG"])
    print("output of", number)
    """)
    machines.start(2)
    machines.start(1)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0}, outputs
    configs = [
        json.loads((tmp_path / f"config-{n}").read_text()) for n in range(3)
    ]
    [addresses] = {tuple(c["cluster"]["worker"]) for c in configs}
    hosts = [address.partition(":")[0] for address in addresses]
    assert hosts == ["127.0.0.1", "127.0.0.2", "127.0.0.2"]
    # The chief's output alone.
    assert "output of 0" in outputs[1] and "output of" not in outputs[2]


def test_machines_that_are_not_listed(machines):
    machines.write("meet(run)")
    for number in (1, 2):
        machines.start(number, "--nodes=2", hosts=None)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0}, outputs


def test_a_machine_that_comes_later_is_taken_in(machines):
    machines.write("""
    meet(run)
    if len(workers) == 2:
        back_up_when_asked(run)
    """)
    machines.start_elastic("2:3", 1, 2)
    machines.wait_for("*/all_can_back_up")
    machines.start_elastic("2:3", 3)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0, 3: 0}, outputs
    # One of them may find its worker ended by the other's first.
    assert "127.0.0.3 can take part" in outputs[1] + outputs[2]
    for number in (1, 2):
        assert "has backed up epoch 1, step 2" in outputs[number]
        assert "All workers start again" in outputs[number]
        assert "Restart" not in outputs[number]
    assert "has begun without this machine" in outputs[3]


@pytest.mark.parametrize(
    "leaving", [3, pytest.param(1, marks=pytest.mark.slow)]
)
def test_the_others_go_on_without_a_machine_that_leaves(machines, leaving):
    """Also without the first, which keeps the board."""
    machines.write("""
    meet(run)
    (folder / f"met-{len(workers)}").touch()
    if len(workers) == 3:
        back_up_when_asked(run)
    """)
    machines.start_elastic("2:3", 1, 2, 3)
    machines.wait_for("*/all_can_back_up")
    machines.launchers[leaving].send_signal(signal.SIGTERM)
    statuses, outputs = machines.wait()
    expected = dict.fromkeys((1, 2, 3), 0) | {leaving: 128 + 15}
    assert statuses == expected, outputs
    assert (machines.script.parent / "met-2").exists()
    assert "SIGTERM ends the launcher" in outputs[leaving]
    assert "Restart" not in outputs[2]


def test_a_machine_that_waits_ends_with_the_training(machines):
    """To begin would be to train anew."""
    machines.write("""
    meet(run)
    (folder / f"met-{len(workers)}").touch()
    while not (folder / "finish").exists():
        time.sleep(0.01)
    """)
    machines.start_elastic("1:2", 1, 2)
    machines.wait_for("met-2")
    [third] = machines.start_elastic("1:2", 3)
    for line in third.stdout:
        if "has begun without this machine" in line:
            break
    (machines.script.parent / "finish").touch()
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0, 3: 0}, outputs
    assert "The others have ended the training meanwhile" in outputs[3]
    assert not (machines.script.parent / "met-1").exists()


def test_who_comes_with_other_numbers_harms_nobody(machines):
    machines.write("""
    meet(run)
    (folder / f"met-{len(workers)}").touch()
    while not (folder / "finish").exists():
        time.sleep(0.01)
    """)
    machines.start_elastic("1:2", 1, 2)
    machines.wait_for("met-2")
    [third] = machines.start_elastic("1:3", 3)
    assert "must be told the same" in third.communicate(timeout=LIMIT)[0]
    (machines.script.parent / "finish").touch()
    assert third.returncode == 2
    del machines.launchers[3]
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0}, outputs


def test_nothing_begins_while_machines_were_told_otherwise():
    posts = board.Board()
    for name, machines in (("a", ("a", "b")), ("b", ("a", "b", "c"))):
        post = board.Post(name, 0, machines=machines)
        _, gathering = posts.exchange(name, post)
    assert gathering.attempt == -1
    post = board.Post("b", 0, machines=("a", "b"))
    _, gathering = posts.exchange("b", post)
    assert gathering.attempt == 0


def test_a_board_that_is_begun_anew_knows_who_has_met():
    """As where the launcher that kept the board leaves before all have read."""
    waiting = {
        name: board.Post(name, 4, addresses=(f"{name}:1",), machines=(2, 3))
        for name in "abc"
    }
    first = board.Board()
    for name, post in waiting.items():
        _, gathering = first.exchange(name, post)
    assert gathering.attempt == 4 and [*gathering.posts] == ["a", "b", "c"]

    anew = board.Board()
    _, unknown = anew.exchange("b", waiting["b"])
    assert unknown.attempt == -1
    members = frozenset("abc")
    taking_part = dataclasses.replace(waiting["a"], members=members)
    anew.exchange("a", taking_part, gathering)
    _, known = anew.exchange("b", waiting["b"])
    assert known == gathering
    # What is older is no news.
    _, known = anew.exchange("b", waiting["b"], board.Gathering(3))
    assert known == gathering


def test_a_launcher_tells_a_new_board_who_has_met(monkeypatch):
    boards = [board.Board()]

    class Manager:
        def __init__(self, address, secret):
            del address, secret

        def connect(self):
            pass

        def board(self):
            return self

        def exchange(self, *args):
            return boards[-1].exchange(*args)

    monkeypatch.setattr(board, "Manager", Manager)
    monkeypatch.setattr(board, "keep_board", lambda *_: False)
    monkeypatch.setattr(board, "BEAT_SECONDS", 0.01)
    waiting = board.Post("b's", 0, addresses=("b:1",), machines=("a", "b"))
    boards[0].exchange("b", waiting)
    member = rendezvous.Member("a", ("a", "b"), ("127.0.0.1", 1), b"s")
    assert member.meet(["a:1"], LIMIT).addresses == ("a:1", "b:1")
    # Where "b" has not read so much yet.
    boards.append(board.Board())
    deadline = time.monotonic() + LIMIT
    while True:
        _, gathering = boards[-1].exchange("b", waiting)
        if gathering.has("b's"):
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gathering.attempt == 0
    member.leave(0)


@pytest.mark.parametrize(
    "statuses, expected",
    [
        ((0, 0), 0),
        ((0, 143), 0),
        ((1, 3), 1),
        ((0, None), None),  # One still runs.
        ((143, 130), None),  # The others may go on.
        ((2, 143), None),
    ],
)
def test_when_a_training_is_over(statuses, expected):
    posts = [
        board.Post(str(i), machines=(1, 3), status=status)
        for i, status in enumerate(statuses)
    ]
    gathering = board.Gathering(0, dict(zip("ab", posts, strict=True)))
    waiting = board.Post("2", machines=(1, 3))
    assert gathering.status_if_over([waiting, *posts]) == expected


@pytest.mark.slow
def test_a_machine_that_leaves_before_it_can_back_up(machines):
    """As while its script loads the data. It counts as no restart."""
    machines.write("""
    meet(run)
    (folder / f"met-{len(workers)}").touch()
    if len(workers) == 3:
        time.sleep(1000)
    """)
    machines.start_elastic("2:3", 1, 2, 3)
    machines.wait_for("met-3")
    machines.launchers[3].send_signal(signal.SIGTERM)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0, 3: 128 + 15}, outputs
    assert "127.0.0.3 has left, because its launcher was ended" in outputs[1]
    assert "Restart" not in outputs[1] + outputs[2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_the_others_go_on_without_a_machine_that_is_lost(machines, number):
    """Without the first as well, because all are of one machine in truth."""
    machines.write("""
    meet(run)
    (folder / f"met-{len(workers)}").touch()
    if len(workers) == 3:
        while not (folder / "lost").exists():
            time.sleep(0.1)
        lose_another()
    """)
    machines.start_elastic("2:3", 1, 2, 3)
    machines.wait_for("met-3")
    lost = machines.launchers.pop(number)
    lost.kill()
    lost.communicate()
    (machines.script.parent / "lost").touch()
    statuses, outputs = machines.wait()
    assert set(statuses.values()) == {0}, outputs
    assert (machines.script.parent / "met-2").exists()
    assert "Restart 1 of 1" in outputs[2]


def test_a_machine_too_many_waits(machines):
    """It takes the place of one that leaves."""
    machines.write("""
    meet(run)
    if not (folder / "enough").exists():
        back_up_when_asked(run)
    """)
    machines.start_elastic("1:2", 1, 2)
    machines.wait_for("*/all_can_back_up")
    [third] = machines.start_elastic("1:2", 3)
    for line in third.stdout:
        if "has begun without this machine" in line:
            break
    (machines.script.parent / "enough").touch()
    machines.launchers[2].send_signal(signal.SIGTERM)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 128 + 15, 3: 0}, outputs
    assert "can take part" not in outputs[1]


FAILURES = {
    "raise ValueError('too bad')": (
        bootstrap.FAILED,
        "worker 2 ended with ValueError: too bad",
    ),
    "os.kill(os.getpid(), signal.SIGKILL)": (
        bootstrap.LOST_A_WORKER,
        "worker 2 was ended by SIGKILL",
    ),
    "os.kill(os.getpid(), signal.SIGSTOP)": (
        bootstrap.LOST_A_WORKER,
        "worker 2 is stopped",
    ),
    "time.sleep(1000)": (
        bootstrap.LOST_A_WORKER,
        "worker 2 did not answer the others, and is stuck",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_every_launcher_names_the_cause(machines, failure):
    machines.write(f"""
    meet(run)
    if number == 2:
        {failure}
    lose_another()
    """)
    for number in (1, 2):
        machines.start(number)
    statuses, outputs = machines.wait()
    status, text = FAILURES[failure]
    assert statuses == {1: status, 2: status}, outputs
    for output in outputs.values():
        assert text in output
        assert "worker 0 ended" not in output


def test_all_start_again(machines):
    machines.write("""
    meet(run)
    if is_first_attempt and number == 0:
        raise ValueError
    """)
    for number in (1, 2):
        machines.start(number, "--max_restarts=1")
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0}, outputs
    for output in outputs.values():
        assert "Restart 1 of 1" in output


@pytest.mark.parametrize(
    "again, status",
    [("", 0), ("raise ValueError", bootstrap.FAILED)],
)
def test_a_launcher_that_is_lost_comes_back(machines, again, status):
    """As after the loss of a machine, here of that with the board.

    The new launcher has no more restarts than the others have.
    """
    machines.write("meet(run); (folder / 'met').touch(); time.sleep(1000)")
    for number in (1, 2):
        machines.start(number, "--max_restarts=1")
    machines.wait_for("met")
    first = machines.launchers[1]
    first.kill()
    first.communicate()
    machines.write(f"meet(folder / 'new'); {again}")
    (machines.script.parent / "new").mkdir()
    machines.start(1, "--max_restarts=1")
    statuses, outputs = machines.wait()
    assert statuses == {1: status, 2: status}, outputs
    # A busy machine may find its silence first.
    assert re.search(
        r"127\.0\.0\.1 (was started again|has not been heard of)", outputs[2]
    ), outputs[2]
    assert "Restart 1 of 1" in outputs[2]
    assert "Restart" not in outputs[1]


@pytest.mark.slow
def test_a_board_that_does_not_answer(machines):
    """Its machine is frozen: connections are taken, and nothing comes."""
    machines.write("meet(run); (folder / 'met').touch(); time.sleep(1000)")
    machines.start(1)
    machines.wait_for_board()
    machines.start(2)
    machines.wait_for("met")
    machines.launchers[1].send_signal(signal.SIGSTOP)
    other = machines.launchers[2]
    output, _ = other.communicate(timeout=LIMIT)
    assert other.returncode == bootstrap.LOST_A_WORKER
    # Both are found at the same time.
    assert (
        f"the rendezvous does not answer at {machines.board}" in output
        or "127.0.0.1 has not been heard of" in output
    )


@pytest.mark.slow
def test_a_machine_that_comes_back_too_late(machines):
    """The attempt is lost, though the frozen machine finds its own well."""
    machines.write("meet(run); (folder / 'met').touch(); time.sleep(25)")
    machines.start(1, "--max_restarts=1")
    machines.wait_for_board()
    machines.start(2, "--max_restarts=1")
    machines.wait_for("met")
    machines.launchers[2].send_signal(signal.SIGSTOP)
    time.sleep(board.SILENT_SECONDS + 3)
    machines.launchers[2].send_signal(signal.SIGCONT)
    statuses, outputs = machines.wait()
    assert statuses == {1: 0, 2: 0}
    for output in outputs.values():
        assert "127.0.0.2 has not been heard of" in output
        assert "Restart 1 of 1" in output


def test_a_launcher_that_is_ended(machines):
    machines.write("meet(run); (folder / 'met').touch(); time.sleep(1000)")
    for number in (1, 2):
        machines.start(number)
    machines.wait_for("met")
    machines.launchers[2].send_signal(signal.SIGTERM)
    statuses, outputs = machines.wait()
    assert statuses == {1: bootstrap.LOST_A_WORKER, 2: 128 + 15}, outputs
    assert "127.0.0.2 has left, because its launcher was ended" in outputs[1]


def test_a_machine_that_does_not_come(machines):
    machines.write("")
    machines.start(1, "--start_timeout=1")
    statuses, outputs = machines.wait()
    assert statuses == {1: bootstrap.LOST_A_WORKER}
    assert "Received: 127.0.0.1. Missing: 127.0.0.2" in outputs[1]


def test_machines_that_were_told_otherwise(machines):
    machines.write("")
    machines.start(1)
    machines.start(2, hosts="127.0.0.1,127.0.0.3,127.0.0.2")
    statuses, outputs = machines.wait()
    assert statuses == {1: 2, 2: 2}
    for output in outputs.values():
        assert "All launchers must be told the same machines" in output


def test_machines_that_allow_other_numbers_of_restarts(machines):
    """Else one would wait for the other, which has ended."""
    machines.write("")
    machines.start(1)
    machines.start(2, "--max_restarts=1")
    statuses, outputs = machines.wait()
    assert statuses == {1: 2, 2: 2}
    for output in outputs.values():
        assert "must be told the same `--max_restarts`. Received: " in output


def test_another_secret(machines):
    machines.write("")
    machines.start(1)
    machines.wait_for_board()
    other = machines.start(2, secret="another")
    output, _ = other.communicate(timeout=LIMIT)
    assert other.returncode == 2
    assert "The secret must be the same on all machines" in output


def test_a_name_that_another_has(machines):
    machines.write("")
    machines.start(1)
    machines.wait_for_board()
    time.sleep(1)  # The first takes its name.
    machines.launchers[3] = machines.launchers.pop(1)
    other = machines.start(1)
    output, _ = other.communicate(timeout=LIMIT)
    assert other.returncode == 2
    assert "Received: 127.0.0.1, which another launcher has" in output


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "The workers must be told"),
        (["--hosts=a,a"], "must be names, each once"),
        (["--hosts=a:0"], "must be names, each once"),
        (["--hosts=a.invalid,b"], "finds no address"),
        (
            ["--hosts=203.0.113.1,203.0.113.2"],
            "which of the hosts this machine is",
        ),
        (["--hosts=203.0.113.1", "--host=c"], "`--host` must be one of the"),
        (["--hosts=127.0.0.1"], "A secret must be given"),
        (["--rendezvous=host0"], "must be a host and a port"),
        (["--rendezvous=host0:1"], "and `--nodes`"),
        (["--hostfile=missing"], "missing"),
        (["--hosts=127.0.0.1", "--workers=1:2"], "`--workers` must be one"),
        (["--hosts=a", "--rendezvous=b:1"], "One of `--hosts`"),
        (["--hosts=a", "--nodes=2"], "One of `--hosts`"),
        (["--hosts=,"], "Hosts must be names, at least one"),
        (["--rendezvous=h:70000", "--nodes=1"], "must be a host and a port"),
        (["--rendezvous=a.invalid:1", "--nodes=2"], "finds no address"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, argv, message):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "TF_REGTOPK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "script.py"
    script.touch()
    assert command.main([*argv, str(script)]) == 2
    assert message in capsys.readouterr().err


def test_a_name_that_only_this_machine_knows(monkeypatch):
    """As Debian writes its own name into /etc/hosts."""
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.1.1")
    with pytest.raises(ValueError, match="which is 127.0.1.1 here"):
        hosts.check_is_reached("host0")
    for address in ("localhost", "127.0.0.1", "::1"):
        hosts.check_is_reached(address)


def test_where_a_host_is():
    assert hosts.is_here("127.0.0.1")
    assert not hosts.is_here("203.0.113.1")  # Kept for documents.
    assert hosts.own_address(("127.0.0.1", 1)) == "127.0.0.1"
