"""The self-test's command: processes, report and document."""

import json
import os
import re
import subprocess
import sys

from absl import app
from absl import flags
import fork_server
import paths
import pytest
import selftest_with_fault
import tensorflow as tf

from tf_regtopk.selftest import checks
from tf_regtopk.selftest import command as command_lib
from tf_regtopk.selftest import gpus
from tf_regtopk.selftest import processes

# Plays a process of checks: `go(name, *statuses)` for those it is to run.
FAKE_CHECKS = """
import json, os, sys, time
settings = json.loads(sys.argv[1])
def say(**line):
    with open(settings["output"], "a") as file:
        print(json.dumps(line), file=file)
def go(name):
    say(check=name, status="running")
    say(check=name, case="first", status="running")
    if "good" in sys.argv:
        pass
    elif name == "codecs":
        say(check=name, case="first", status="failed", found="so it is")
        say(check=name, status="done")
        sys.exit()
    elif name == "sparsifiers":
        print("out of luck", flush=True)
        os.abort()
    elif name == "fit":
        time.sleep(100)
    say(check=name, case="first", status="ok", found="all")
    say(check=name, case="second", status="skipped", found="no need")
    say(check=name, status="done")
say(gpus=[], software={"TensorFlow": "9"}, is_cuda_build=False)
for name in settings["checks"]:
    go(name)
"""


def test_help_lists_the_flags():
    done = subprocess.run(
        [sys.executable, "-m", "tf_regtopk.selftest", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "--checks" in done.stdout and "--[no]quick" in done.stdout


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Function that runs the command with such processes."""
    monkeypatch.setattr(
        processes, "COMMAND", (sys.executable, "-c", FAKE_CHECKS)
    )
    monkeypatch.setattr(gpus, "driver_error", lambda: "no driver")

    def run(**arguments):
        values = flags.FlagValues()
        command_lib.define_flags(values)
        output = tmp_path / "report.json"
        values(["", f"--output={output}"])
        for name, value in arguments.items():
            values[name].value = value
        status = command_lib.run(values)
        report = json.loads(output.read_text("utf-8"))
        assert report["exit_status"] == status
        return status, capsys.readouterr().out, report

    return run


def test_an_output_that_cannot_be_written(tmp_path):
    """Is told before any check runs."""
    values = flags.FlagValues()
    command_lib.define_flags(values)
    values(["", f"--output={tmp_path / 'missing' / 'report.json'}"])
    with pytest.raises(app.UsageError, match="`--output` must be") as info:
        command_lib.run(values)
    assert info.value.exitcode == command_lib.USAGE


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_each_check_is_reported(command, jobs):
    """Also after one has failed, crashed, or (once) not come to an end."""
    names = ["options", "codecs", "sparsifiers", "saving", "speed"]
    if jobs == 1:
        names.insert(3, "fit")
    status, output, report = command(
        checks=names, jobs=jobs, limit_seconds=10.0
    )
    assert status == command_lib.FAILED
    results = {r["check"]: r for r in report["checks"]}
    assert set(results) == {"environment", *names}
    failed = {
        "codecs": "1 of 1 cases: first: so it is",
        "sparsifiers": "1 of 1 cases: first: the process ended with status -6",
        "fit": "1 of 1 cases: first: no end after 10 s",
    }
    for name, result in results.items():
        if name in failed:
            assert result["status"] == "failed"
            assert result["found"].startswith(failed[name])
            assert f"\nFAILED  {name} " in output
        else:
            assert result["status"] == "ok"
            assert f"\nok      {name} " in output
            assert result["found"] == "1 case. first: all; second: no need"
    assert "out of luck" in results["sparsifiers"]["found"]
    assert f"4 checks passed, {len(names) - 3} failed (" in output
    # Nothing runs beside the times.
    assert report["checks"][-1]["check"] == "speed"


def test_all_pass(command, monkeypatch):
    monkeypatch.setattr(
        processes,
        "COMMAND",
        (
            sys.executable,
            "-c",
            FAKE_CHECKS.replace("sys.argv[1]", "sys.argv[2]"),
            "good",
        ),
    )
    status, output, report = command(quick=True)
    assert status == command_lib.PASSED
    assert {r["check"] for r in report["checks"]} == set(checks.QUICK)
    assert f"{len(checks.QUICK)} checks passed in" in output


def test_workers_can_be_left_out(command):
    _, _, report = command(workers="0", limit_seconds=1.0)
    assert {r["check"] for r in report["checks"]} == (
        set(checks.CHECKS) - checks.OF_WORKERS
    )


def test_says_why_there_is_no_gpu(command, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    status, output, report = command(device_type="GPU")
    assert status == command_lib.NO_GPU
    assert output.startswith("TensorFlow 9 sees no GPU.\n")
    for reason in (
        "It was built without CUDA",
        "CUDA_VISIBLE_DEVICES='-1'",
        "The driver's library cannot be loaded: no driver",
    ):
        assert reason in output
    assert report["reasons"] == output.splitlines()


def test_no_answer(command, monkeypatch):
    monkeypatch.setattr(
        processes,
        "COMMAND",
        (sys.executable, "-c", "raise SystemExit('cannot import')"),
    )
    status, output, _ = command(device_type="GPU")
    assert status == command_lib.FAILED
    assert (
        "TensorFlow does not say what devices it sees: cannot import" in output
    )


def test_what_tensorflow_says_of_gpus():
    lines = [
        "W0000 00:00:17.9 5870 gpu_device.cc:2343] Cannot dlopen some GPU "
        "libraries. Please make sure",
        "W0000 00:00:18.0 5870 gpu_device.cc:2343] Cannot dlopen some GPU "
        "libraries. Please make sure",
        "I0000 00:00:17.9 5870 cpu_feature_guard.cc:227] This TensorFlow",
        "I0000 00:00:17.9 5870 dso_loader.cc:144] Could not load dynamic "
        "library 'libcudnn.so.9'; dlerror: no such file",
    ]
    reasons = gpus.why_no_gpu({"TensorFlow": "9"}, True, lines)
    assert [r for r in reasons if r.startswith("TensorFlow: ")] == [
        "TensorFlow: Cannot dlopen some GPU libraries. Please make sure",
        "TensorFlow: Could not load dynamic library 'libcudnn.so.9'; dlerror: "
        "no such file",
    ]
    assert not any("without CUDA" in reason for reason in reasons)


def test_memory_is_shared(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81000\necho 40000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    free = gpus.gpu_memory()
    assert free == 40000
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    jobs = gpus.default_jobs("GPU", free)
    limit = gpus.memory_limit(free, jobs)
    assert 1 < jobs <= 16
    assert limit >= gpus.SMALLEST_LIMIT
    assert 2 * limit * jobs < free
    assert gpus.default_jobs("GPU", 3000) == 1
    assert gpus.memory_limit(free, 1) > 2 * limit
    program.write_text("#!/bin/sh\necho 595.58.03\n")
    assert gpus.driver_version() == "595.58.03"
    for text in ("exit 9", "echo '[N/A]'", ""):
        program.write_text(f"#!/bin/sh\n{text}\n")
        assert gpus.gpu_memory() is None


def test_import_defines_no_flags():
    assert "limit_seconds" not in flags.FLAGS


@pytest.mark.slow
def test_a_fault_fails_exactly_one_check(tmp_path):
    output = tmp_path / "selftest.json"
    result = fork_server.run_one(
        selftest_with_fault.__file__,
        ["--quick", "--device_type=CPU", f"--output={output}"]
        # Whatever else this machine is doing.
        + ["--limit_seconds=900"],
        timeout=1200,
    )
    assert result.returncode == command_lib.FAILED, result.stderr
    report = json.loads(output.read_text("utf-8"))
    statuses = {r["check"]: r["status"] for r in report["checks"]}
    assert statuses == {
        name: "failed" if name == "error_feedback" else "ok"
        for name in checks.QUICK
    }, result.stdout
    assert "FAILED  error_feedback" in result.stdout
    assert report["software"]["TensorFlow"] == tf.__version__


def test_command_on_cpus(tmp_path):
    """On the machine code that users have, unlike other tests."""
    names = ("environment", "one_device", "sparsifiers", "codecs")
    result = fork_server.run_one(
        "tf_regtopk.selftest",
        [
            f"--checks={','.join(names)}",
            "--quick",
            "--device_type=CPU",
            # All checks share a process, because each process takes seconds
            # to import TensorFlow.
            "--jobs=1",
            f"--output={tmp_path / 'selftest.json'}",
        ],
        timeout=600,
        XLA_FLAGS="",
    )
    assert result.returncode == command_lib.PASSED, result.stderr
    for name in names:
        assert f"\nok      {name} " in result.stdout


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--checks=codex", "Received: codex"),
        ("--jobs=0", "jobs"),
        ("extra", "Unknown arguments: ['extra']"),
    ],
)
def test_wrong_arguments(argument, message):
    result = fork_server.run_one("tf_regtopk.selftest", [argument])
    assert result.returncode == command_lib.USAGE
    assert message in result.stdout + result.stderr


def test_document():
    text = (paths.ROOT / "docs" / "gpus.md").read_text("utf-8")
    [section] = re.findall(
        r"^## Check the machine first\n(.*?)(?=^## |\Z)", text, re.M | re.S
    )
    assert "python -m tf_regtopk.selftest\n" in section
    values = flags.FlagValues()
    command_lib.define_flags(values)
    for flag in re.findall(r"--([a-z_]+)", section):
        assert flag in values, flag
    statuses = {int(s) for s in re.findall(r"^\| (\d) \|", section, re.M)}
    assert statuses == {
        command_lib.PASSED,
        command_lib.FAILED,
        command_lib.USAGE,
        command_lib.NO_GPU,
    }
    columns = re.findall(r"^\| (`.*?) \|", section, re.M)
    marked = {
        name: bool(mark)
        for column in columns
        for name, mark in re.findall(r"`([a-z_]+)`( ¹)?", column)
    }
    assert marked == {name: name not in checks.QUICK for name in checks.CHECKS}
