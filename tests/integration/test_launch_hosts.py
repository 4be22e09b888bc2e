"""The launcher on two hosts, which are namespaces joined by a link."""

import os
import re
import signal
import subprocess
import sys
import time

import multi_worker_launcher
import paths
import pytest

from benchmarks.cluster import namespaces

LIMIT = 240
EXAMPLE = paths.EXAMPLES / "multi_worker.py"
HOSTS = ("10.78.0.1", "10.78.0.2")
SILENT_SECONDS = 25


def ip(command):
    subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture
def names():
    """Names of two namespaces of which each has an address of `HOSTS`."""
    if reason := namespaces.why_not():
        pytest.skip(f"No network of namespaces here: {reason}.")
    names = [f"launch-{os.getpid()}-{i}" for i in range(2)]
    for name in names:
        ip(f"netns add {name}")
    try:
        links = [f"v{os.getpid() % 10**6}-{i}" for i in range(2)]
        ip(f"link add {links[0]} type veth peer name {links[1]}")
        for name, link, host in zip(names, links, HOSTS, strict=True):
            ip(f"link set {link} netns {name} name eth0")
            ip(f"-n {name} address add {host}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            ip(f"netns delete {name}")


@pytest.fixture
def launchers(names, tmp_path):
    """Launchers of the example, one on each host, that have begun to train."""
    with multi_worker_launcher.processes() as started:
        for i, name in enumerate(names):
            command = [sys.executable, "-m", "tf_regtopk.run"]
            command += [f"--hosts={','.join(HOSTS)}", "--max_restarts=1"]
            command += [EXAMPLE, f"--output_dir={tmp_path / 'output'}"]
            command += ["--epochs=8", "--timeout_seconds=60"]
            program = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
            started.append(
                multi_worker_launcher.Process(
                    ["-c", program, "ip", "netns", "exec", name, *command],
                    tmp_path / f"output-{i}.txt",
                    TF_REGTOPK_SECRET="secret",
                )
            )
        started[0].wait_for("Epoch 3/", LIMIT)
        yield started


def kill(names, launchers):
    del names
    pids = re.findall(r"\(processes (\d+)\)", launchers[1].output)
    os.kill(int(pids[-1]), signal.SIGKILL)


def cut_the_link(names, launchers):
    del launchers
    ip(f"-n {names[0]} link set eth0 down")
    time.sleep(SILENT_SECONDS)
    ip(f"-n {names[0]} link set eth0 up")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, told",
    [
        (kill, ["worker 1 was ended by SIGKILL"] * 2),
        (
            cut_the_link,
            [
                f"{HOSTS[1]} has not been heard of",
                f"the rendezvous does not answer at {HOSTS[0]}"
                f"|{HOSTS[0]} has not been heard of",
            ],
        ),
    ],
)
def test_goes_on_after(fault, told, names, launchers):
    fault(names, launchers)
    for launcher, text in zip(launchers, told, strict=True):
        assert launcher.wait(LIMIT) == 0, launcher.output
        assert re.search(text, launcher.output), launcher.output
        assert "Restart 1 of 1" in launcher.output
    assert re.search(r"Resuming \S+ after epoch", launchers[0].output)
