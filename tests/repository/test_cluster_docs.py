"""Runs what `docs/cluster.md` says, and checks what Kubernetes would take.

Every block of shell in the document runs as it stands. The tests say where by
the environment variables that it reads. Slurm is played by `fake_slurm.py`.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import fake_slurm
import multi_worker
import multi_worker_launcher
import paths
import pytest
import yaml

from tf_regtopk.launch import arguments
from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import command as launch_command
from tf_regtopk.launch import shares

DOCUMENT = (paths.ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
TIMEOUT = 180
# Where the image of the manifest has the repository, and its volume.
IMAGE_ROOT, VOLUME = "/opt/tf_regtopk", "/results"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.M | re.S)


LOOPBACK, HOSTS, ELASTIC, TRAIN, SBATCH = blocks("sh")


@pytest.fixture
def place(tmp_path):
    """A folder like the repository's root, with the scripts of the document."""
    (tmp_path / "examples").symlink_to(paths.ROOT / "examples")
    (tmp_path / "train.sh").write_text(TRAIN)
    fake = f"{sys.executable} {fake_slurm.__file__}"
    programs = {
        "python": sys.executable,
        "sbatch": f"{fake} sbatch",
        "srun": f"{fake} srun",
    }
    (tmp_path / "bin").mkdir()
    for name, command in programs.items():
        make_program(tmp_path / "bin" / name, f'exec {command} "$@"')
    return tmp_path


def make_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Command:
    """A command in `place`, in a process group of its own."""

    def __init__(self, place, command, **env):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name != "TF_CONFIG" and not name.startswith("SLURM")
        }
        path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
        self.path = place / f"output_{time.monotonic_ns()}.txt"
        with open(self.path, "wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=place,
                env={
                    **inherited,
                    "CUDA_VISIBLE_DEVICES": "-1",
                    "PYTHONPATH": str(paths.ROOT),
                    **env,
                    "PATH": path,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self):
        return self.path.read_text(errors="replace")

    def wait(self):
        try:
            return self.popen.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"No end:\n{self.output[-5000:]}") from None

    def wait_for(self, text):
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            assert self.popen.poll() is None, self.output[-5000:]
            assert time.monotonic() < deadline, self.output[-5000:]
            time.sleep(0.05)

    def end(self):
        # First in a way that lets the example end what it has started.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(5)


@pytest.fixture
def run(place):
    """Function that starts a command. It ends with the test, or before."""
    commands = []

    def start(command, **env):
        commands.append(Command(place, command, **env))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


def check_results(folder, output, epochs, first_epoch=0):
    """Checks the files, and what the chief has said since its last start."""
    before, _, said = output.rpartition(" replicas, ")
    assert before.endswith("2")
    begun = re.findall(rf"Epoch (\d+)/{epochs}\b", said)
    assert [*map(int, begun)] == [*range(first_epoch + 1, epochs + 1)]
    assert float(re.findall(r"val_accuracy: ([\d.]+)", said)[-1]) > 0.2
    assert (folder / "model.keras").exists()
    assert not (folder / "backup").exists()


def test_one_machine(place, run):
    command = run(["sh", "-c", LOOPBACK])
    assert command.wait() == 0, command.output
    check_results(place / "results" / "multi_worker", command.output, epochs=2)


# ----- Hosts of your own -----


def listening(pid):
    """Where a process takes connections: address and port in hexadecimal."""
    inodes = set()
    for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        lines = pathlib.Path(f"/proc/{pid}/net/{table}").read_text()
        for line in lines.splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(tuple(fields[1].split(":")))
    return found


def parent_of(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"PPid:\s+(\d+)", status)[1])


@pytest.mark.slow
def test_hosts_of_your_own_lose_a_worker(place, run):
    """The command of two hosts, through a loss to the end."""
    (place / ".tf_regtopk_secret").write_text("a secret\n")
    [board] = shares.free_ports(1, "127.0.0.1")
    hosts = ("127.0.0.1", "127.0.0.2")
    launchers = []
    for host in hosts:
        where = f"--hosts={','.join(hosts)} --host={host}"
        block = HOSTS.replace(
            "--hosts=host0,host1", f"{where} --rendezvous_port={board}"
        )
        assert block != HOSTS
        launchers.append(run(["sh", "-c", "set -e\n" + block], HOME=str(place)))
    launchers[0].wait_for("Epoch 2/")
    workers = [
        int(re.search(r"\(processes (\d+)\)", launcher.output)[1])
        for launcher in launchers
    ]
    for worker in workers:
        [(host, _)] = listening(worker)
        assert set(host) == {"0"}  # Not loopback: all interfaces.
    # One launcher listens, at the address that it was told.
    of_launchers = set.union(*(listening(parent_of(w)) for w in workers))
    assert of_launchers == {("0100007F", f"{board:04X}")}
    os.kill(workers[1], signal.SIGKILL)
    for launcher in launchers:
        assert launcher.wait() == 0, launcher.output
        assert "worker 1 was ended by SIGKILL" in launcher.output
    output = launchers[0].output
    [first_epoch] = re.findall(r"Resuming \S+ after epoch (\d+)", output)
    assert int(first_epoch) >= 1
    folder = place / "results" / "multi_worker"
    check_results(folder, output, 4, int(first_epoch))


@pytest.mark.slow
def test_machines_that_come_and_go(place, run):
    """The command of machines, of which one comes later and another leaves."""
    (place / ".tf_regtopk_secret").write_text("a secret\n")
    [board] = shares.free_ports(1, "127.0.0.1")
    launchers = []

    def start():
        host = f"127.0.0.{len(launchers) + 1}"
        block = ELASTIC.replace(
            "--rendezvous=host0:29500",
            f"--rendezvous=127.0.0.1:{board} --host={host}",
        )
        assert block != ELASTIC
        launchers.append(run(["sh", "-c", "set -e\n" + block], HOME=str(place)))

    start()
    start()
    chief = launchers[0]
    chief.wait_for("2 replicas, 64 images per step")
    chief.wait_for("Epoch 2/")
    start()
    chief.wait_for("3 replicas, 63 images per step")
    while "Epoch " not in chief.output.rpartition("3 replicas")[2]:
        chief.wait_for("3 replicas")  # Ends the wait if the launcher has ended.
        time.sleep(0.05)
    # The launcher of the second machine gets SIGTERM.
    started = r"\(processes (\d+)\)"
    launchers[1].wait_for("(processes ")
    worker = int(re.findall(started, launchers[1].output)[-1])
    os.kill(parent_of(worker), signal.SIGTERM)
    assert launchers[1].wait() == bootstrap.BACKED_UP, launchers[1].output
    for launcher in (chief, launchers[2]):
        assert launcher.wait() == 0, launcher.output
        assert "Restart" not in launcher.output
    assert re.findall(r"(\d) replicas, \d+ images", chief.output)[-1] == "2"


# ----- Slurm -----


def job_with_free_ports(count):
    """Number of a job for which the ports that `train.sh` takes are free."""
    for job in range(os.getpid(), os.getpid() + 1000):
        base = 12000 + job % 1000 * 20
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, s in enumerate(sockets):
                s.bind(("", base + offset))
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
        return job
    raise AssertionError("No free ports.")


@pytest.mark.slow
def test_slurm(place, run):
    (place / "bin" / "nvidia-smi").symlink_to("/bin/false")
    command = run(
        ["sh", "-c", SBATCH],
        FAKE_SLURM_JOB_ID=str(job_with_free_ports(2)),
        PAUSE="1",
    )
    assert command.wait() == 0, command.output
    check_results(place / "results" / "multi_worker", command.output, epochs=2)


# ----- Kubernetes -----


@pytest.fixture(scope="module")
def manifest():
    """The objects of the manifest by their kind."""
    text = (paths.ROOT / "examples" / "tfjob.yaml").read_text(encoding="utf-8")
    objects = list(yaml.safe_load_all(text))
    by_kind = {each["kind"]: each for each in objects}
    assert len(by_kind) == len(objects)
    return by_kind


def test_manifest_is_as_the_operator_wants_it(manifest):
    assert set(manifest) == {
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "TFJob",
    }
    job = manifest["TFJob"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    assert set(job["spec"]) <= {"runPolicy", "successPolicy", "tfReplicaSpecs"}
    assert job["spec"]["successPolicy"] == "AllWorkers"
    assert set(job["spec"]["tfReplicaSpecs"]) == {"Worker"}
    worker = job["spec"]["tfReplicaSpecs"]["Worker"]
    assert set(worker) == {"replicas", "restartPolicy", "template"}
    # Else the operator gives no TF_CONFIG.
    assert worker["replicas"] >= 2
    # The operator's "ExitCode" takes statuses below 128 for good.
    assert bootstrap.LOST_A_WORKER < 128
    assert worker["restartPolicy"] == "OnFailure"
    # One restart of every worker is to be survived many times.
    limit = job["spec"]["runPolicy"]["backoffLimit"]
    assert limit >= 5 * worker["replicas"]

    pod = worker["template"]["spec"]
    assert "restartPolicy" not in pod  # The operator's own counts.
    [container] = pod["containers"]
    assert container["name"] == "tensorflow"
    assert container["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]


def test_manifest_fits_together(manifest):
    worker = manifest["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    [container], [volume] = pod["containers"], pod["volumes"]
    [mount] = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": VOLUME}
    claim = manifest["PersistentVolumeClaim"]
    assert claim["apiVersion"] == "v1"
    assert volume["persistentVolumeClaim"] == {
        "claimName": claim["metadata"]["name"]
    }
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]

    policy = manifest["NetworkPolicy"]
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    labels = worker["template"]["metadata"]["labels"]
    [rule] = policy["spec"]["ingress"]
    [source], [port] = rule["from"], rule["ports"]
    for selector in (policy["spec"]["podSelector"], source["podSelector"]):
        assert selector == {"matchLabels": labels}
    assert port["port"] == container["ports"][0]["containerPort"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.slow
def test_manifest_runs(manifest, run, place):
    worker = manifest["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    program, *options, script, output = container["command"]
    assert (program, *options[:2]) == ("python", "-m", "tf_regtopk.run")
    script = re.sub(f"^{IMAGE_ROOT}/", f"{paths.ROOT}/", script)
    assert script == multi_worker.__file__
    assert output.startswith(f"--output_dir={VOLUME}/")
    output_dir = place / output.removeprefix(f"--output_dir={VOLUME}/")
    addresses = multi_worker_launcher.free_addresses(worker["replicas"])
    workers = []
    for index in range(worker["replicas"]):
        # As the operator writes it.
        tf_config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
            "environment": "cloud",
        }
        workers.append(
            run(
                [program, *options, script, f"--output_dir={output_dir}"]
                + ["--epochs=2"],
                TF_CONFIG=json.dumps(tf_config, separators=(",", ":")),
            )
        )
    for each in workers:
        assert each.wait() == 0, each.output
    check_results(output_dir, workers[0].output, epochs=2)


def test_image_has_what_the_manifest_starts(manifest):
    dockerfile = (paths.ROOT / "examples" / "Dockerfile").read_text("utf-8")
    lines = [
        shlex.split(line)
        for line in dockerfile.splitlines()
        if not line.startswith("#")
    ]
    by_word = {
        word: [line[1:] for line in group]
        for word, group in itertools.groupby(lines, lambda line: line[0])
    }
    assert list(by_word) == ["FROM", "WORKDIR", "COPY", "RUN"]
    assert by_word["WORKDIR"] == [[IMAGE_ROOT]]
    copied = {
        (source, target)
        for *sources, target in by_word["COPY"]
        for source in sources
    }
    for source, target in copied:
        assert (paths.ROOT / source).exists()
        assert target == (source if (paths.ROOT / source).is_dir() else "./")
    assert {source for source, _ in copied} >= {"examples", "tf_regtopk"}
    setup = (paths.ROOT / "setup.py").read_text(encoding="utf-8")
    # What `setup.py` and the build read has to be there.
    for name in re.findall(r'root / "([^"]+)"', setup) + ["pyproject.toml"]:
        assert name in {source for source, _ in copied}
    [[*pip, requirement]] = by_word["RUN"]
    assert pip[:2] == ["pip", "install"]
    for extra in re.fullmatch(r"\.\[(.*)\]", requirement).group(1).split(","):
        assert f'"{extra}": ' in setup
    [container] = manifest["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"][
        "template"
    ]["spec"]["containers"]
    options = re.search("# +docker build (.*)", dockerfile)[1].split()
    assert options[0] == f"--tag={container['image']}"
    assert options[1:] == ["--file=examples/Dockerfile", "."]


# ----- The document itself -----


def test_document_shows_nothing_else():
    """All blocks are run or checked above."""
    languages = re.findall(r"^```(.+)$", DOCUMENT, re.M)
    assert set(languages) == {"sh"}


def test_statuses_in_the_document():
    table = re.findall(r"^\| (\d+) \| (.*?) \|", DOCUMENT, re.M)
    meanings = {int(status): meaning for status, meaning in table}
    assert set(meanings) == {
        0,
        bootstrap.FAILED,
        launch_command.WRONG_ARGUMENTS,
        bootstrap.LOST_A_WORKER,
        bootstrap.PORT_TAKEN,
        bootstrap.BACKED_UP,
    }
    assert "backed up" in meanings[bootstrap.BACKED_UP]
    assert "script" in meanings[bootstrap.FAILED]
    assert "arguments" in meanings[launch_command.WRONG_ARGUMENTS]
    assert "lost" in meanings[bootstrap.LOST_A_WORKER]
    assert "port" in meanings[bootstrap.PORT_TAKEN]


def test_links_and_flags_in_the_document():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT):
        assert (paths.ROOT / "docs" / target).exists(), target
    for fragment in re.findall(r"\]\(#([^)]+)\)", DOCUMENT):
        headings = re.findall(r"^## (.*)$", DOCUMENT, re.M)
        assert fragment in {h.lower().replace(" ", "-") for h in headings}
    source = "".join(
        pathlib.Path(module.__file__).read_text(encoding="utf-8")
        for module in (multi_worker, arguments)
    )
    flags = set(re.findall(r"`--([a-z]+_[a-z_]+)", DOCUMENT))
    assert len(flags) > 2
    for flag in flags:
        assert f'"{flag}",' in source or f'"--{flag}",' in source
