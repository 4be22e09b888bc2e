"""Standbys of the launcher, with modules that stand in for TensorFlow."""

import json
import pathlib
import re
import signal
import subprocess
import textwrap
import time

import pytest
import script_launcher

from tf_regtopk.launch import arguments
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import cluster
from tf_regtopk.launch import process
from tf_regtopk.launch import shares
from tf_regtopk.launch import standby

LIMIT = 60
# Modules with the names of slow ones. One notes what it sees at its import.
TENSORFLOW = """
import os, pathlib
os.environ["BY_IMPORT"] = "1"
number = len(os.sched_getaffinity(0))
note = f"{os.environ.get('BY_SCRIPT')}, {number} cores"
pathlib.Path(os.environ["PLACE"], f"imported-{os.getpid()}").write_text(note)
print("imported")
"""
KERAS = "import tensorflow"
# Writes down what the script sees, which is to be the same in all attempts, and
# whether the modules were imported before.
SCRIPT = """
place = pathlib.Path(os.environ["PLACE"])
variables = {k: v for k, v in os.environ.items() if k != "BY_IMPORT"}
for name in ("TF_CONFIG", "TF_REGTOPK_LAUNCH_DIR"):
    variables.pop(name)
state = [sys.argv, sys.path, os.getcwd(), __name__, __file__, variables]
state += [sorted(os.sched_getaffinity(0)), sys.stdin.read()]
was_imported = "keras" in sys.modules
os.environ["BY_SCRIPT"] = "set"
sys.path.insert(1, str(place / "library"))
import keras
state.append(os.environ["BY_IMPORT"])
result = place / f"{notes.name}-{number}"
result.write_text(json.dumps([state, was_imported, os.getpid()]))


def standbys():
    pids = {int(p.name[9:]) for p in place.glob("imported-*")}
    workers = {json.loads(p.read_text())[2] for p in place.glob("attempt-*")}
    return pids - workers


meet()
(notes / f"saved-{number}").write_text("")
if is_first_attempt:
    while len(standbys()) < 2:
        time.sleep(0.01)
    meet(where="there")
"""
FAIL = """
if is_first_attempt:
    if number == 1:
        sys.exit(5)
    time.sleep(1000)
"""


@pytest.fixture
def start(tmp_path):
    """Function that starts a launcher of two workers of a script."""
    (tmp_path / "tensorflow.py").write_text(TENSORFLOW)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "keras.py").write_text(KERAS)
    launchers = []

    def start(end, *options, script=("script.py",)):
        text = script_launcher.PRELUDE + SCRIPT + textwrap.dedent(end)
        (tmp_path / "script.py").write_text(text)
        launchers.append(
            script_launcher.start(
                *("--workers=2", "--standby", "--show=all", *options),
                f"--log_dir={tmp_path / 'logs'}",
                *script,
                cwd=tmp_path,
                PLACE=str(tmp_path),
            )
        )
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def results(place, attempt):
    return [
        json.loads((place / f"attempt-{attempt}-{number}").read_text())
        for number in range(2)
    ]


@pytest.mark.parametrize(
    "script", [("script.py", "--option"), ("-m", "script", "--option")]
)
def test_a_standby_runs_the_script_as_a_new_process_does(
    start, tmp_path, script
):
    # Nothing follows the second attempt, so none stands by.
    end = FAIL + "time.sleep(1)\nassert not standbys()"
    launcher = start(end, "--max_restarts=1", script=script)
    output, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, output
    assert "), 2 from standbys, with their output" in output
    before, after = results(tmp_path, 0), results(tmp_path, 1)
    for number in range(2):
        state, was_imported, _ = before[number]
        assert not was_imported
        assert after[number][0] == state
        assert after[number][1]
    pids = [pid for _, _, pid in after]
    started = re.findall(r"\(processes (.*?)\)", output)
    assert started[1] == ", ".join(map(str, pids))
    notes = [p.read_text() for p in tmp_path.glob("imported-*")]
    cores = 1 if len(shares.cores()) > 1 else len(shares.cores())
    assert notes[0] == f"set, {cores} cores" or len(shares.cores()) > 3
    assert len(set(notes)) == 1 and len(notes) == 4
    # What a standby prints is in the log of its attempt.
    log = tmp_path / "logs" / "attempt-1" / "worker-1.log"
    assert log.read_text() == "imported\n"


def test_a_standby_that_has_died_is_replaced(start, tmp_path):
    end = """
    if is_first_attempt and number == 1:
        for pid in standbys():
            os.kill(pid, signal.SIGKILL)
    """
    launcher = start(end + textwrap.dedent(FAIL), "--max_restarts=1")
    output, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, output
    assert "from standbys" not in output
    assert [r[1] for r in results(tmp_path, 1)] == [False, False]


def test_several_attempts(start, tmp_path):
    """A worker that stood by has a standby, too."""
    end = """
    if notes.name == "attempt-1":
        while len(standbys()) < 2:
            time.sleep(0.01)
        meet(where="there")
        sys.exit(5)
    """
    launcher = start(textwrap.dedent(end) + FAIL, "--max_restarts=2")
    output, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, output
    assert output.count("), 2 from standbys, with their output") == 2
    state = results(tmp_path, 0)[0][0]
    assert results(tmp_path, 2)[0][0] == state


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
)
def test_standbys_end_with_the_launcher(start, tmp_path, number):
    launcher = start("print('ready')\ntime.sleep(1000)", "--max_restarts=1")
    output = ""
    while "ready" not in output:
        output += (line := launcher.stdout.readline())
        assert line, output
    pids = [int(p.name[9:]) for p in tmp_path.glob("imported-*")]
    assert len(pids) == 4
    launcher.send_signal(number)
    launcher.wait(LIMIT)
    deadline = time.monotonic() + LIMIT
    while any(script_launcher.is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_standby_ends_without_an_order(tmp_path):
    """As where the launcher has ended on a system other than Linux."""
    popen = process.start(
        cluster.place_of(["a:1"], 0),
        [str(tmp_path / "never.py")],
        {"stands_by": True},
        {},
        stdin=subprocess.PIPE,
    )
    output, _ = popen.communicate(
        b'[["json", ["/nowhere"], {}]]\n', timeout=LIMIT
    )
    assert popen.returncode == 0 and output == b""


def test_nobody_reads_the_environment_of_a_script(tmp_path):
    """Which may have read secrets before it imports TensorFlow."""
    own = cluster.place_of(["a:1"], 0)
    imports = [["json", [], {"SECRET": "hunter2"}]]
    waiting = standby.Standby(own, ["x.py"], imports)
    try:
        path = pathlib.Path(f"/proc/{waiting._popen.pid}/cmdline")
        deadline = time.monotonic() + LIMIT
        while not (command := path.read_text()):
            assert time.monotonic() < deadline
        assert "bootstrap.py" in command and "hunter2" not in command
    finally:
        waiting.end()
    path = tmp_path / "worker-0.imports"
    bootstrap._NotesOfImports(str(path)).find_spec("keras")
    assert path.stat().st_mode & 0o777 == 0o600
    [[name, *_]] = json.loads(path.read_text())
    assert name == "keras"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers=2"], "must go with `--max_restarts`"),
        (["--workers=1:2", "--max_restarts=1"], "a fixed number of"),
    ],
)
def test_a_standby_that_could_never_serve_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--standby", *options, __file__], "")
    assert message in capsys.readouterr().err


def test_a_standby_fits_places_with_its_cores_and_gpus():
    cores = tuple(shares.cores())
    own = cluster.place_of(["a:1", "b:1"], 0, ("0",), cores)
    waiting = standby.Standby(own, ["x.py"], [["json", [], {}]])
    try:
        assert waiting.fits(own)
        assert waiting.fits(cluster.place_of(["c:1"], 0, ("0",), cores))
        assert not waiting.fits(cluster.place_of(["a:1"], 0, ("1",), cores))
        assert not waiting.fits(cluster.place_of(["a:1"], 0, ("0",), (99,)))
    finally:
        waiting.end()
    assert not waiting.fits(own)
    assert waiting.become_worker({}, {}) is None
