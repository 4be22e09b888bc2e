"""Runs what `docs/cluster.md` says, and `examples/tfjob.yaml`.

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

from absl import app
import fake_slurm
import multi_worker
import multi_worker_launcher
import paths
import pytest
import tensorflow as tf
import yaml

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import command as launch_command

DOCUMENT = (paths.ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
TIMEOUT = 180
# Where the image of the manifest has the repository, and its volume.
IMAGE_ROOT, VOLUME = "/opt/tf_regtopk", "/results"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.M | re.S)


LOOPBACK, WORKER, TRAIN, SBATCH, SUPERVISE = blocks("sh")


@pytest.fixture
def place(tmp_path):
    """A folder like the repository's root, with the scripts of the document."""
    (tmp_path / "examples").symlink_to(paths.ROOT / "examples")
    scripts = {
        "worker.sh": WORKER,
        "train.sh": TRAIN,
        "supervise.sh": SUPERVISE,
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
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


def check_summary(folder, epochs, first_epoch=0):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_replicas"] == summary["config"]["num_workers"] == 2
    assert summary["first_epoch"] == first_epoch
    assert len(summary["history"]["loss"]) == epochs - first_epoch
    assert summary["final"]["accuracy"] > 0.2
    assert (folder / "model.keras").exists()
    assert not (folder / "backup").exists()


def test_one_machine(place, run):
    command = run(["sh", "-c", LOOPBACK])
    assert command.wait() == 0, command.output
    check_summary(place / "results" / "multi_worker", epochs=2)


# ----- Hosts of your own -----


def child_of(pid):
    """The only child of a process."""
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    [child] = path.read_text().split()
    return int(child)


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


@pytest.mark.slow
def test_hosts_of_your_own_lose_a_worker(place, run):
    """`supervise.sh`, and so `worker.sh`, through a loss to the end."""
    addresses = multi_worker_launcher.free_addresses(2)
    supervisors = [
        run(
            ["sh", "supervise.sh", "--epochs=12", "--batch_size=256"]
            + ["--sequential_input", "--density=1"],
            WORKERS=" ".join(addresses),
            INDEX=str(index),
            PAUSE="1",
        )
        for index in range(2)
    ]
    supervisors[0].wait_for("Epoch 4/")
    workers = [child_of(supervisor.popen.pid) for supervisor in supervisors]
    for worker, address in zip(workers, addresses, strict=True):
        port = f"{int(address.split(':')[1]):04X}"
        [(host, open_port)] = listening(worker)
        assert open_port == port
        assert set(host) == {"0"}  # Not loopback: all interfaces.
    os.kill(workers[1], signal.SIGKILL)
    for supervisor in supervisors:
        assert supervisor.wait() == 0, supervisor.output
    output = supervisors[0].output
    assert "worker 0 lost another worker." in output
    [first_epoch] = re.findall(r"Resuming after epoch (\d+)", output)
    assert int(first_epoch) >= 3
    check_summary(
        place / "results" / "multi_worker", 12, first_epoch=int(first_epoch)
    )


def tf_config_of(place, **env):
    """What `worker.sh` gives the example as `TF_CONFIG`, and its arguments."""
    make_program(place / "bin" / "python", 'printf "%s\n" "$TF_CONFIG" "$@"')
    output = subprocess.run(
        ["sh", "worker.sh", "--epochs=3", "--output_dir=a b"],
        cwd=place,
        env={"PATH": f"{place / 'bin'}:{os.environ['PATH']}", **env},
        capture_output=True,
        check=True,
        text=True,
        timeout=TIMEOUT,
    ).stdout
    tf_config, *argv = output.splitlines()
    assert argv == [
        "examples/multi_worker.py",
        "--epochs=3",
        "--output_dir=a b",
    ]
    return json.loads(tf_config)


def test_tf_config_of_many_hosts(place):
    hosts = [f"node-{i}.cluster:23456" for i in range(11)]
    for index in (0, 10):
        assert tf_config_of(
            place, WORKERS=" ".join(hosts), INDEX=str(index)
        ) == {
            "cluster": {"worker": hosts},
            "task": {"type": "worker", "index": index},
        }


def test_tf_config_as_the_script_has_it(place):
    assert tf_config_of(place) == {
        "cluster": {"worker": ["host0:12345", "host1:12345"]},
        "task": {"type": "worker", "index": 0},
    }


@pytest.mark.parametrize(
    "script, program, arguments",
    [
        ("supervise.sh", "worker.sh", ["--epochs=3"]),
        ("train.sh", "bin/srun", ["--epochs=3"]),
    ],
)
@pytest.mark.parametrize(
    "statuses, expected, num_starts",
    [
        ([0], 0, 1),
        ([3, 137, 4, 0], 0, 4),
        ([3, 1, 0], 1, 2),
        ([3] * 100, 3, 20),
    ],
)
def test_loops(
    place, script, program, arguments, statuses, expected, num_starts
):
    """What is started again, and how often."""
    (place / "statuses").write_text("\n".join(map(str, statuses)))
    make_program(
        place / program,
        'echo "$@" >> starts\nexit "$(sed -n "$(wc -l < starts)p" statuses)"',
    )
    status = subprocess.run(
        ["bash", script, *arguments],
        cwd=place,
        env={
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "PAUSE": "0",
            "SLURM_JOB_ID": "7",
        },
        check=False,
        timeout=TIMEOUT,
    ).returncode
    assert status == expected
    starts = (place / "starts").read_text().splitlines()
    assert len(starts) == num_starts
    assert all(start.endswith(" ".join(arguments)) for start in starts)


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
    check_summary(place / "results" / "multi_worker", epochs=2)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Function that puts this process into a Slurm step, without GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # No nvidia-smi.

    def enter(nodes, tasks_per_node, num_tasks, number, node, local_number):
        for name, value in {
            "SLURMD_NODENAME": node,
            "SLURM_LOCALID": local_number,
            "SLURM_PROCID": number,
            "SLURM_STEP_NODELIST": nodes,
            "SLURM_STEP_NUM_TASKS": num_tasks,
            "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        }.items():
            monkeypatch.setenv(name, str(value))

    return enter


@pytest.mark.parametrize(
    "nodes, tasks_per_node, counts",
    [
        ("a01", "1", {"a01": 1}),
        ("n[9-10]", "1(x2)", {"n9": 1, "n10": 1}),
        ("n[9-10]", "2,1", {"n9": 2, "n10": 1}),
        ("a,b[1,3-4]", "3(x2),2,1", {"a": 3, "b1": 3, "b3": 2, "b4": 1}),
    ],
)
def test_each_task_finds_its_own_address(slurm, nodes, tasks_per_node, counts):
    # As Slurm numbers tasks, by blocks.
    tasks = [
        (node, local)
        for node, count in counts.items()
        for local in range(count)
    ]
    addresses = {f"{node}:{2000 + local}" for node, local in tasks}
    seen = []
    for number, (node, local) in enumerate(tasks):
        slurm(nodes, tasks_per_node, len(tasks), number, node, local)
        resolver = multi_worker.slurm_resolver(2000)
        workers = resolver.cluster_spec().as_dict()["worker"]
        assert set(workers) == addresses and len(workers) == len(tasks)
        assert resolver.task_type == "worker"
        assert workers[resolver.task_id] == f"{node}:{2000 + local}"
        assert resolver.rpc_layer == "grpc"
        assert resolver.num_accelerators() == {"GPU": 0}
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        seen.append((resolver.task_id, tuple(workers)))
    assert sorted(index for index, _ in seen) == list(range(len(tasks)))
    assert len({workers for _, workers in seen}) == 1


def test_what_tensorflows_own_resolver_needs(slurm):
    """If one of these fails, `slurm_resolver` can do without a correction."""
    own = tf.distribute.cluster_resolver.SlurmClusterResolver
    slurm("n[9-10]", "1(x2)", 2, 0, "n9", 0)
    with pytest.raises(FileNotFoundError):
        own()
    with pytest.raises(ValueError, match="must not be zero"):
        own(gpus_per_node=0).cluster_spec()
    resolver = own(gpus_per_node=1)
    workers = resolver.cluster_spec().as_dict()["worker"]
    assert workers[resolver.task_id] == "n10:8888"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert resolver.num_accelerators() == {"GPU": 1}


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_refuses_to_be_outside_of_srun(slurm, monkeypatch, missing):
    slurm("n[9-10]", "1(x2)", 2, 0, "n9", 0)
    monkeypatch.delenv(missing)
    with pytest.raises(app.UsageError, match="must be used in a task"):
        multi_worker.slurm_resolver(2000)


def test_refuses_a_host_that_is_not_in_the_step(slurm):
    slurm("n[9-10]", "1(x2)", 2, 0, "n11", 0)
    with pytest.raises(app.UsageError, match="'SLURMD_NODENAME': 'n11'"):
        multi_worker.slurm_resolver(2000)


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
    program, script, *arguments = container["command"]
    assert program == "python"
    script = re.sub(f"^{IMAGE_ROOT}/", f"{paths.ROOT}/", script)
    assert script == multi_worker.__file__
    [output_dir] = [
        argument.split("=")[1]
        for argument in arguments
        if argument.startswith("--output_dir=")
    ]
    assert output_dir.startswith(f"{VOLUME}/")
    arguments = [
        argument.replace(f"={VOLUME}/", f"={place}/") for argument in arguments
    ]
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
                [program, script, *arguments]
                + ["--epochs=2", "--sequential_input", "--density=1"],
                TF_CONFIG=json.dumps(tf_config, separators=(",", ":")),
            )
        )
    for each in workers:
        assert each.wait() == 0, each.output
    check_summary(place / output_dir.removeprefix(f"{VOLUME}/"), epochs=2)


def test_image_has_what_the_manifest_starts(manifest):
    [dockerfile] = blocks("dockerfile")
    lines = [shlex.split(line) for line in dockerfile.strip().splitlines()]
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
    assert f"docker build --tag={container['image']} ." in DOCUMENT


def test_start_has_a_timeout_of_its_own(run):
    addresses = multi_worker_launcher.free_addresses(2)
    worker = run(
        ["python", multi_worker.__file__, "--start_timeout_seconds=1"]
        + ["--timeout_seconds=600"],
        TF_CONFIG=multi_worker_launcher.tf_config(addresses, 0),
    )
    assert worker.wait() == -signal.SIGKILL, worker.output
    assert f"waited 1 s for the start of {addresses[1]}." in worker.output


# ----- The document itself -----


def test_document_shows_nothing_else():
    """All blocks are run or checked above, but the one of Python."""
    assert set(re.findall(r"^```(.+)$", DOCUMENT, re.M)) == {
        "dockerfile",
        "python",
        "sh",
    }
    [snippet] = blocks("python")
    assert "slurm_resolver(port_base=" in snippet


def test_statuses_in_the_document():
    table = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", DOCUMENT, re.M)
    meanings = {
        int(status): meaning
        for statuses, meaning in table
        for status in statuses.split(", ")
    }
    assert set(meanings) == {
        0,
        1,
        bootstrap.LOST_A_WORKER,
        bootstrap.PORT_TAKEN,
        128 + signal.SIGABRT,
        128 + signal.SIGKILL,
        128 + signal.SIGTERM,
    }
    assert "lost" in meanings[bootstrap.LOST_A_WORKER]
    assert "port" in meanings[bootstrap.PORT_TAKEN]


def test_links_and_flags_in_the_document():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT):
        assert (paths.ROOT / "docs" / target).exists(), target
    for fragment in re.findall(r"\]\(#([^)]+)\)", DOCUMENT):
        headings = re.findall(r"^## (.*)$", DOCUMENT, re.M)
        assert fragment in {h.lower().replace(" ", "-") for h in headings}
    source = "".join(
        pathlib.Path(program.__file__).read_text(encoding="utf-8")
        for program in (multi_worker, launch_command)
    )
    flags = set(re.findall(r"`--([a-z]+_[a-z_]+)", DOCUMENT))
    assert len(flags) > 2
    for flag in flags:
        assert f'"{flag}",' in source or f'"--{flag}",' in source
