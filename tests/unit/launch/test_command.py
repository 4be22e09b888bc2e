"""The launcher, with scripts that need no TensorFlow."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import paths
import pytest
import script_launcher

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import command
from tf_regtopk.launch import groups
from tf_regtopk.launch import notes
from tf_regtopk.launch import shares
from tf_regtopk.launch import supervision
from tf_regtopk.launch import worker

LIMIT = 60


@pytest.fixture(autouse=True)
def _signals():
    """Takes the launcher's signal handlers away again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def launch(tmp_path, capfdbinary):
    """Function that runs a script, and returns the status and what is shown."""

    def run(script, *options, workers=2, arguments=()):
        path = tmp_path / "script.py"
        path.write_text(
            script_launcher.PRELUDE + textwrap.dedent(script), "utf-8"
        )
        status = command.main(
            [f"--workers={workers}", f"--log_dir={tmp_path / 'logs'}"]
            + ["--device=cpu", *options, str(path), *arguments]
        )
        shown = capfdbinary.readouterr()
        return status, shown.out.decode(), shown.err.decode()

    return run


def test_each_worker_knows_its_place(launch, tmp_path):
    script = f"""
    place = [config, sys.argv[1:], os.environ["CUDA_VISIBLE_DEVICES"]]
    place += [sorted(os.sched_getaffinity(0)), sys.path[0], __name__]
    pathlib.Path({str(tmp_path)!r}, str(number)).write_text(json.dumps(place))
    """
    # Options of the script are not the launcher's.
    arguments = ["--workers=7", "-x", "--", "name"]
    status, _, _ = launch(script, workers=2, arguments=arguments)
    assert status == 0
    places = [json.loads((tmp_path / str(n)).read_text()) for n in range(2)]
    configs, passed, gpus, cores, paths, names = zip(*places, strict=True)
    assert [c["task"] for c in configs] == [
        {"type": "worker", "index": n} for n in range(2)
    ]
    assert configs[0]["cluster"] == configs[1]["cluster"]
    assert len(set(configs[0]["cluster"]["worker"])) == 2
    assert passed == (arguments, arguments)
    assert gpus == ("-1", "-1")
    assert paths == (str(tmp_path), str(tmp_path))
    assert names == ("__main__", "__main__")
    everywhere = shares.cores()
    if len(everywhere) > 1:
        assert sorted(cores[0] + cores[1]) == everywhere
    else:
        assert cores == (everywhere, everywhere)


def test_a_module(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(
        "import sys\nfrom package import data\n"
        "print(__name__, data.name, sys.argv[1:], __file__)"
    )
    (tmp_path / "package" / "data.py").write_text("name = __name__")
    launcher = script_launcher.start(
        "--workers=1",
        *("-m", "package.train", "-m", "--epochs=2"),
        PYTHONPATH=os.pathsep.join([str(paths.ROOT), str(tmp_path)]),
    )
    output, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, output
    path = tmp_path / "package" / "train.py"
    said = f"__main__ package.data ['-m', '--epochs=2'] {path}"
    assert said in output.splitlines()


def places(workers, device, cores="share"):
    args = argparse.Namespace(
        workers=(workers, workers), device=device, cores=cores
    )
    return groups.OneMachine(args).places()


def test_more_workers_than_cores_share_them(monkeypatch):
    monkeypatch.setattr(shares, "cores", lambda: [0, 1, 2])
    assert [place.cores for place in places(3, "cpu")] == [(0,), (1,), (2,)]
    assert [place.cores for place in places(4, "cpu")] == [()] * 4
    of_all = places(3, "cpu", cores="all")
    assert [place.cores for place in of_all] == [()] * 3


@pytest.mark.parametrize(
    "visible, expected",
    [("0,1,2,3", [("0", "1"), ("2", "3")]), ("GPU-a, GPU-b,-1,3", None)],
)
def test_gpus_are_shared_out(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = expected or [("GPU-a",), ("GPU-b",)]
    found = places(2, "auto")
    assert [place.gpus for place in found] == expected
    assert not any(place.cores for place in found)
    assert not any(place.gpus for place in places(2, "cpu"))
    with pytest.raises(ValueError, match="at most the number of GPUs"):
        places(5, "auto")


def test_no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not any(place.gpus for place in places(2, "auto"))
    with pytest.raises(ValueError, match="Received: 2 workers, 0 GPUs"):
        places(2, "gpu")


@pytest.mark.parametrize(
    "show, expected",
    [
        ("chief", ["of 0", "more of 0"]),
        ("none", []),
        (
            "all",
            ["[worker 0] of 0", "[worker 0] more of 0"]
            + ["[worker 1] of 1", "[worker 1] more of 1"],
        ),
    ],
)
def test_output(launch, tmp_path, show, expected):
    script = """
    print("of", number)
    print("more of", number, file=sys.stderr)
    """
    _, out, _ = launch(script, f"--show={show}")
    assert sorted(out.splitlines()) == sorted(expected)
    for number in range(2):
        log = tmp_path / f"logs/attempt-0/worker-{number}.log"
        assert log.read_text() == f"of {number}\nmore of {number}\n"


# What worker 1 of 3 does, the status of the launcher, and what is told. The
# others sleep, or lose it.
FAILURES = {
    "an error": (
        "raise ValueError('bad thing')",
        1,
        "worker 1 ended with ValueError: bad thing, after",
    ),
    "an exit": ("sys.exit(7)", 1, "worker 1 ended with sys.exit(7), after"),
    "a message": (
        "sys.exit('no data')",
        1,
        "worker 1 ended with sys.exit('no data')",
    ),
    "an abrupt end": ("os._exit(9)", 1, "worker 1 ended with status 9, after"),
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        3,
        "worker 1 was ended by SIGKILL",
    ),
    "crashed": ("os.abort()", 3, "worker 1 was ended by SIGABRT, after"),
    "stopped": (
        "os.kill(os.getpid(), signal.SIGSTOP)",
        3,
        "worker 1 is stopped (SIGSTOP), after",
    ),
    "stuck": ("time.sleep(1000)", 3, "worker 1 did not answer the others"),
    "ended too early": ("sys.exit()", 3, "worker 1 had ended before the other"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_cause_is_told(launch, monkeypatch, name):
    monkeypatch.setattr(supervision, "_SETTLE_SECONDS", 1.0)
    does, expected_status, told = FAILURES[name]
    script = f"""
    print("a line of", number)
    meet()
    if number == 1:
        {does}
    time.sleep(0.2 if {name!r} in ("stuck", "ended too early") else 1000)
    lose_another()
    """
    since = time.monotonic()
    status, out, err = launch(script, workers=3)
    assert status == expected_status
    assert told in err
    assert "| a line of 1" in err
    assert "worker 0 " not in err and "worker 2 " not in err
    assert "2 other workers ended with it" in err
    assert out.startswith("a line of 0\n")
    assert time.monotonic() - since < LIMIT


def test_all_lose_each_other(launch):
    status, _, err = launch("meet(); lose_another('DeadlineExceededError')")
    assert status == 3
    for number in range(2):
        assert (
            f"worker {number} ended with DeadlineExceededError: "
            "Connection reset, after" in err
        )
    told = [line for line in err.splitlines() if line.startswith("worker")]
    assert not any("Additional" in line for line in told)


PLACES = """Graph execution error:

Detected at node Gather defined at (most recent call last):
  File "train.py", line 1, in <module>

  File "collectives.py", line 113, in _gather
"""
REST = "\nThe error could be from a previous operation.\n\t [[{{node Gather}}]]"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ""),
        (" \nbad\nworse", "bad"),
        (f"{PLACES}\nAborted by: a worker.{REST}", "Aborted by: a worker."),
        (
            "Graph execution error:\n\nDetected at node Gather\n"
            f"<stack traces unavailable>\nAborted.{REST}",
            "Aborted.",
        ),
        ("Graph execution error:", "Graph execution error:"),
        (
            'in user code:\n\n    File "a.py", line 3, in f  *\n        1 / 0\n'
            "\n    ZeroDivisionError: division by zero\n",
            "ZeroDivisionError: division by zero",
        ),
        ("in user code:\n\n    x = 3", "in user code:"),
    ],
)
def test_line_of_an_error_that_is_told(text, expected):
    assert bootstrap.message_of(RuntimeError(text)) == expected


def test_line_of_an_error_of_the_system():
    error = OSError(28, "Can't close file (time = 3\n, errno = 28)")
    assert bootstrap.message_of(error) == (
        "[Errno 28] Can't close file (time = 3 (No space left on device)"
    )
    error = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert bootstrap.message_of(error) == str(error)


def test_traceback_is_that_of_the_script(launch, tmp_path):
    launch("def f(): raise ValueError('bad')\nf()", workers=1)
    log = (tmp_path / "logs/attempt-0/worker-0.log").read_text()
    assert log.startswith("Traceback (most recent call last):\n  File ")
    assert "bootstrap.py" not in log and "runpy" not in log
    assert log.endswith("ValueError: bad\n")


def test_restarts(launch, tmp_path):
    script = """
    (notes / f"backup-{number}").write_text("/the/backups")
    if is_first_attempt and number == 1:
        sys.exit(5)
    if is_first_attempt:
        time.sleep(1000)
    """
    status, _, err = launch(script, "--max_restarts=2")
    assert status == 0
    assert (
        "Restart 1 of 2: all workers start again, from the last backup that "
        "all have in /the/backups." in err
    )
    assert "Restart 2" not in err
    assert (tmp_path / "logs" / "attempt-1" / "worker-1.log").exists()


def test_restarts_end(launch):
    status, _, err = launch("sys.exit(5)", "--max_restarts=1", workers=1)
    assert status == 1
    assert err.count("worker 0 ended with sys.exit(5)") == 2
    assert err.count("has not called `tf_regtopk.Backup.restore`") == 2
    assert "ends with status 1, after 1 of 1 restarts" in err


def test_fewer_workers_after_a_loss_and_all_of_them_when_asked(launch):
    status, shown, told = launch(
        """
        meet()
        num_workers = len(config["cluster"]["worker"])
        if number == 0:
            print("workers:", num_workers)
        if num_workers == 3 and is_first_attempt:
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            lose_another()
        if num_workers == 2:
            if number == 0:
                os.kill(os.getppid(), signal.SIGUSR1)
            back_up_when_asked()
        """,
        "--max_restarts=1",
        workers="2:3",
    )
    assert status == 0, told
    assert re.findall("workers: .", shown) == [
        "workers: 3",
        "workers: 2",
        "workers: 3",
    ]
    assert "SIGUSR1 asks for 3 workers. The workers back up, and end." in told


def test_asking_for_workers_that_are_there_already():
    args = argparse.Namespace(workers=(1, 2), device="cpu", cores="all")
    group = groups.OneMachine(args)
    assert len(group.places()) == 2
    signal.raise_signal(signal.SIGUSR1)
    assert group.reason_to_resize() == ""
    group.settle([worker.Failure("worker 1", "was ended")])
    assert len(group.places()) == 1
    signal.raise_signal(signal.SIGUSR1)
    assert group.reason_to_resize() == "SIGUSR1 asks for 2 workers"
    assert len(group.places()) == 2


def test_an_error_of_the_script_leaves_all_workers(launch):
    status, shown, _ = launch(
        """
        meet()
        if number == 0:
            print("workers:", len(config["cluster"]["worker"]))
        if is_first_attempt:
            raise ValueError
        """,
        "--max_restarts=1",
        workers="1:2",
    )
    assert status == 0
    assert re.findall("workers: .", shown) == ["workers: 2"] * 2


class Asked(Exception):
    """Ends the wait."""


@pytest.mark.parametrize("num_that_can", [0, 1, 2])
def test_all_workers_can_back_up_before_one_is_asked(tmp_path, num_that_can):
    class Running:
        number, name, has_succeeded = 0, "worker 0", False

        def failure(self):
            if not num_asked and not reasons:
                raise Asked
            return None

        def ask_to_end(self):
            num_asked.append(1)
            if len(num_asked) == 2:
                raise Asked

    num_asked, reasons = [], ["more have come"]
    for i in range(num_that_can):
        (tmp_path / f"can_back_up-{i}").touch()
    calls = []

    def reason_to_end():
        return reasons.pop()

    def failures_elsewhere():
        calls.append(1)
        if len(calls) == 3:
            raise Asked
        return []

    with pytest.raises(Asked):
        supervision.wait_for(
            [Running(), Running()],
            tmp_path,
            60,
            failures_elsewhere,
            reason_to_end,
        )
    assert len(num_asked) == (2 if num_that_can == 2 else 0)


READY = "ready\n"
BACK_UP = "back_up_when_asked()"
NO_BACKUP = "meet(); print('ready'); time.sleep(1000)"
STUCK = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(notes / f"can_back_up-{number}").write_text("")
meet()
print("ready")
time.sleep(1000)
"""


@pytest.mark.parametrize(
    "script, grace_seconds, signals, expected",
    [
        (BACK_UP, 30, ("SIGTERM",), "has backed up epoch 1, step 2"),
        (BACK_UP, 30, ("SIGINT",), ""),
        # Without a backup there is nothing to wait for.
        (NO_BACKUP, 1000, ("SIGTERM",), ""),
        (STUCK, 1, ("SIGTERM",), "have not ended within 1 s"),
        (STUCK, 1000, ("SIGTERM", "SIGTERM"), ""),
    ],
)
def test_workers_back_up_before_the_end(
    tmp_path, script, grace_seconds, signals, expected
):
    path = tmp_path / "script.py"
    path.write_text(script_launcher.PRELUDE + script, "utf-8")
    launcher = script_launcher.start(
        "--workers=2", f"--grace_seconds={grace_seconds}", path
    )
    output, to_send = "", [signal.Signals[name] for name in signals]
    while to_send:
        output += (line := launcher.stdout.readline())
        assert line, output
        if line == READY or "SIGTERM ends" in line:
            launcher.send_signal(to_send.pop(0))
    output += launcher.communicate(timeout=LIMIT)[0]
    assert launcher.returncode == 128 + signal.Signals[signals[0]], output
    assert expected in output
    assert expected or "has backed up" not in output


@pytest.mark.parametrize("num_taken, expected", [(2, 0), (3, 4)])
def test_other_ports_where_some_are_taken(launch, num_taken, expected):
    script = f"""
    attempt = int(notes.name.rpartition("-")[2])
    if attempt < {num_taken} and number == 1:
        raise RuntimeError("Could not start gRPC server")
    if attempt < {num_taken}:
        time.sleep(1000)
    """
    status, _, err = launch(script)
    assert status == expected
    assert err.count("A port was taken meanwhile.") == 2


def test_a_worker_that_does_not_start(launch):
    script = """
    meet()
    if number != 1:
        (notes / f"arrived-{number}").write_text(str(number))
    time.sleep(1000)
    """
    status, _, err = launch(script, "--start_timeout=1", workers=3)
    assert status == 3
    assert "worker 1 has not created its strategy within 1 s" in err
    assert "worker 0 has" not in err


def test_processes_of_workers_end_with_them(launch, tmp_path):
    script = f"""
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; "
                              "time.sleep(1000)"])
    pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
    sys.exit(1)
    """
    launch(script, workers=1)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + LIMIT
    while script_launcher.is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_launcher(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], f'pid-{os.getpid()}').touch()\n"
        "time.sleep(1000)\n"
    )
    launcher = script_launcher.start(
        "--workers=2", f"--log_dir={tmp_path / 'logs'}", script, tmp_path
    )
    try:
        deadline = time.monotonic() + LIMIT
        while len(pids := [*tmp_path.glob("pid-*")]) < 2:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        launcher.send_signal(number)
        status = launcher.wait(LIMIT)
        assert status == {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15}[number]
        while any(
            script_launcher.is_running(int(p.name.partition("-")[2]))
            for p in pids
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--workers=0", "x.py"], "integer of at least 1. Received: 0"),
        (["--workers=two", "x.py"], "Received: two"),
        (["--workers=1", "--max_restarts=-1", "x.py"], "at least 0"),
        (["--workers=1", "missing.py"], "must be a file. Received: missing.py"),
        (["--workers=1"], "required: script"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_logs_of_an_earlier_run_are_kept(launch, tmp_path):
    """The same command goes on, also with `--log_dir`."""
    for text in ("first", "second", "third"):
        status, _, _ = launch(f"print({text!r})", workers=1)
        assert status == 0
        if text == "second":
            shutil.rmtree(tmp_path / "logs" / "attempt-0")
    for number, text in ((1, "second"), (2, "third")):
        log = tmp_path / "logs" / f"attempt-{number}" / "worker-0.log"
        assert log.read_text() == f"{text}\n"


def test_a_folder_of_logs_that_is_a_file(launch, tmp_path):
    (tmp_path / "logs").touch()
    status, _, err = launch("", workers=1)
    assert status == 2
    assert "File exists" in err and "Traceback" not in err


def test_notes(tmp_path, monkeypatch):
    monkeypatch.delenv(notes.VARIABLE, raising=False)
    notes.write("backup", "nobody reads this")
    monkeypatch.setenv(notes.VARIABLE, str(tmp_path))
    assert notes.read(tmp_path, "backup") == []
    notes.write("backup", "first")
    notes.write("backup", "second")
    assert notes.read(tmp_path, "backup") == ["second"]
    monkeypatch.setenv(notes.VARIABLE, str(tmp_path / "missing"))
    notes.write("backup", "third")


def test_the_launcher_has_no_tensorflow():
    """Of its own: it would be 400 MB, and some seconds before the workers."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tf_regtopk.run", "--help"],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    modules = {
        line.split("|")[-1].strip() for line in result.stderr.split("\n")
    }
    assert "tf_regtopk.launch.command" in modules
    assert not {"tensorflow", "keras", "numpy", "tf_regtopk.methods"} & modules
    assert "--max_restarts" in result.stdout
