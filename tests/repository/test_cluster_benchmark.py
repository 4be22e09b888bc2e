"""The cluster of network namespaces, and what its benchmark counts."""

import doctest
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from absl import flags
import fork_server
import kept_runs
import numpy as np
import old_versions
import paths
import pytest
import run_with_mock_data
import tqdm

from benchmarks.cluster import methods
from benchmarks.cluster import namespaces
from benchmarks.cluster import report
from benchmarks.cluster import step
from benchmarks.cluster import time_to_accuracy
from benchmarks.cluster import traffic


@pytest.fixture
def needs_network():
    if reason := namespaces.why_not():
        pytest.skip(f"No network of namespaces here: {reason}.")


# ----- Pure parts -----


def test_conditions():
    assert namespaces.parse_condition("unshaped") == (None, 0)
    assert namespaces.parse_condition("100mbit") == (1e8, 0)
    assert namespaces.parse_condition("1gbit") == (1e9, 0)
    assert namespaces.parse_condition("5ms") == (None, 0.005)
    for name in ("", "fast", "1tbit", "5"):
        with pytest.raises(ValueError, match="A network must be"):
            namespaces.parse_condition(name)


def test_burst_hides_little():
    assert namespaces.burst_bytes(10**8) == 15_000
    assert namespaces.burst_bytes(10**9) == 150_000


def test_counters():
    text = (
        "Inter-|   Receive                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed ...|...\n"
        "    lo:    9   9    0    0    0     0  0  0    9  9 0 0 0 0 0 0\n"
        "  eth0:  100   2    0    0    0     0  0  0 2000 30 0 0 0 0 0 0\n"
        "  eth1:5 6 0 0 0 0 0 0 70 8 0 0 0 0 0 0\n"
    )
    assert namespaces.parse_counters(text) == (2070, 38)
    assert namespaces.sent_counters()[0] >= 0


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0.25, (1, 4, 5)),
        (1.0, (1, 1, 5)),
        (0.000001, (1, 100, 5)),
        (6.0, (0, 1, 3)),
        (1.25, (0, 1, 4)),
    ],
)
def test_choice_of_steps(seconds, expected):
    assert step.choose_steps(seconds, 1.0, 5) == expected


def test_slow_methods_take_part_in_some_rounds():
    assert step.choose_steps(6.0, 1.0, 1) == (0, 1, 1)
    for own_rounds in range(1, 6):
        taken = [step.takes_part(r, 5, own_rounds) for r in range(5)]
        assert sum(taken) == own_rounds


@pytest.mark.parametrize("size", [1, 20_000, 1_000_000, 11_000_000])
def test_size_of_the_network(size):
    count = methods.num_parameters(size)
    assert abs(count - size) <= max(0.02 * size, 2000)


def answer(seconds, sent_bytes):
    return {
        "seconds": seconds,
        "sent_bytes": sent_bytes,
        "sent_packets": 3,
        "cpu_seconds": 0.15,
        "counted_steps": 3,
    }


class Played:
    """Workers whose first steps last as long as they are told."""

    def __init__(self, seconds, later):
        self._seconds, self._later = list(seconds), later
        self.asked = []

    def ask(self, do, method, first, lead_in, steps):
        assert first == sum(map(sum, self.asked))
        self.asked.append((lead_in, steps))
        lasted = [
            self._seconds.pop(0) if self._seconds else self._later
            for _ in range(lead_in + steps)
        ]
        return [answer(lasted[lead_in:], 600)]


@pytest.mark.parametrize(
    "seconds, later, asked",
    [
        ([], 0.5, [(0, 1), (0, 1), (1, 2), *[(1, 4)] * 3]),
        # The first one compiles.
        ([9.0], 0.5, [(0, 1), (0, 1), (1, 2), *[(1, 4)] * 3]),
        # They take long indeed.
        ([9.0], 4.0, [(0, 1), (0, 1), *[(0, 1)] * 3]),
    ],
)
def test_steps_of_a_turn_do_not_follow_from_the_first_one(
    seconds, later, asked
):
    workers = Played(seconds, later)
    found = step.measure(
        ["topk"],
        lambda method: workers,
        step.Pace(3, 2.0),
        "",
        tqdm.tqdm(disable=True),
    )
    assert workers.asked == asked
    assert found["topk"]["milliseconds"] == 1000 * later


def records():
    turns = [
        [answer([0.1, 0.3], 600), answer([0.2, 0.2], 1200)],
        [answer([0.2, 0.2], 600), answer([0.1, 0.2], 1200)],
    ]
    made = []
    for method, factor in (("dense", 4), ("auto:0.001", 2), ("local", 1)):
        record = report.make_record(turns, 66)
        record["milliseconds"] *= factor
        made.append(
            {"network": "100mbit", "size": 11_000_000, "method": method}
            | record
        )
    made[1]["chosen_exchange"] = "sparse"
    made[1]["reported_bytes"] = 200
    report.compare(made)
    return made


def test_records():
    dense, auto, local = records()
    assert local["milliseconds"] == pytest.approx(200)
    assert (local["rounds"], local["steps"]) == (2, 4)
    assert local["sent_bytes"] == 300
    assert local["header_bytes"] == 66
    assert local["cpu_milliseconds"] == pytest.approx(50)
    assert auto["speedup_over_dense"] == 2
    assert dense["exchange_share"] == 0.75
    assert auto["counted_over_reported"] == 1.5
    assert dense["counted_over_reported"] is None


def test_tables():
    made = records()
    made.append(made[0] | {"network": "1gbit", "milliseconds": 1.25})
    assert report.markdown_table({"results": made}) == (
        "| | 100mbit 11M | 1gbit 11M |\n"
        "| --- | ---: | ---: |\n"
        "| dense, milliseconds | 800 | 1.2 |\n"
        "| auto 0.1 % | 2.00 (sparse) | - |\n"
        "| local | 4.00 | - |"
    )
    lines = report.text_table(made).splitlines()
    assert "auto 0.1 % (sparse)" in lines[2]
    assert "800.0" in lines[1] and "400.0" in lines[2]


@pytest.mark.parametrize("module", [report, methods, time_to_accuracy])
def test_examples_of_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# ----- The network -----


def in_namespace(network, worker, program, *args):
    return subprocess.Popen(
        network.command(worker, sys.executable, "-c", program, *args),
        stdout=subprocess.PIPE,
        text=True,
    )


# Reads to the end, and says what the data were.
RECEIVER = """
import hashlib, socket
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    digest = hashlib.sha256()
    while data := connection.recv(1 << 20):
        digest.update(data)
    print(digest.hexdigest())
"""
SENDER = """
import hashlib, random, socket, sys
data = random.Random(sys.argv[2]).randbytes(20_000_000)
with socket.create_connection((sys.argv[1], 5000), 10) as connection:
    connection.sendall(data)
print(hashlib.sha256(data).hexdigest())
"""


def test_delay(needs_network):
    """Also under load from all sides nothing is lost or changed."""
    with namespaces.Network(3) as network:
        means = network.change("5ms")
        assert means in ("switch", "netem")
        probe = network.probe(seconds=0.3)
        # Python wakes up late on a busy machine, but never early.
        assert 9.9 < probe["round_trip_milliseconds"] < 25
        receivers = [in_namespace(network, i, RECEIVER) for i in range(3)]
        senders = []
        try:
            for receiver in receivers:
                receiver.stdout.readline()
            senders += [
                in_namespace(
                    network, i, SENDER, network.addresses[(i + 1) % 3], str(i)
                )
                for i in range(3)
            ]
            sent = [s.communicate(timeout=60)[0] for s in senders]
            received = [r.communicate(timeout=60)[0] for r in receivers]
        finally:
            for process in [*receivers, *senders]:
                process.kill()
                process.wait()
        assert received == [sent[2], sent[0], sent[1]]
        if means == "switch":
            counts = network.switch_statistics()
            assert counts["bytes"] > 60_000_000
            assert counts["lost_frames"] == 0
        # And back, under the feet of what is there.
        assert network.change("unshaped") == "nothing"
        assert network.probe(seconds=0.1)["round_trip_milliseconds"] < 9.9
    assert not namespaces.leftovers(os.getpid())


def test_probe_server_reads_until_the_client_has_the_answer(monkeypatch):
    """A client that sends on beside the answer loses no connection."""
    with socket.create_server(("", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(traffic, "_PORT", port)
    server = threading.Thread(target=traffic.probe_server, daemon=True)
    server.start()
    connect_when_ready(port).close()
    with connect_when_ready(port) as connection:
        connection.sendall(struct.pack("d", 0.01))
        while not select.select([connection], [], [], 0)[0]:
            connection.sendall(bytes(1 << 16))
        for _ in range(20):
            connection.sendall(bytes(1 << 16))
            time.sleep(0.01)
        assert struct.unpack("d", connection.recv(8))[0] > 0
    server.join(timeout=60)
    assert not server.is_alive()


def connect_when_ready(port):
    for _ in range(600):
        try:
            return socket.create_connection(("localhost", port), 60)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"Nothing listens at port {port}.")


def test_rate(needs_network):
    with namespaces.Network(2) as network:
        assert network.change("100mbit") == "tbf"
        rate = network.probe(seconds=0.5)["link_bits_per_second"]
        # Less where the machine is busy; never more.
        assert 0.8e8 < rate < 1.03e8
    assert not namespaces.leftovers(os.getpid())


def start(output_dir, *args):
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "benchmarks.cluster.step"),
            "--sizes=20000",
            "--num_workers=2",
            "--networks=unshaped",
            "--rounds=1",
            "--seconds_per_turn=0.5",
            f"--output_dir={output_dir}",
            *args,
        ],
        cwd=paths.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_quick_run(needs_network, tmp_path):
    sparse = "sparse:0.25:int32+float32"
    buckets = sparse.replace("sparse", "buckets2")
    process = start(
        tmp_path, f"--methods=dense,{sparse},{buckets}", "--profile_steps=2"
    )
    try:
        _, errors = process.communicate(timeout=500)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors[-3000:]
    assert "Left behind" not in errors
    assert not namespaces.leftovers(process.pid)
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert (tmp_path / "figure.png").exists()
    found = {r["method"]: r for r in summary["results"]}
    assert set(found) == {"dense", sparse, buckets, "local"}
    # About 40 KB of entries, and the 1,600 bytes of TensorFlow's own framing.
    assert 1 < found[sparse]["payload_over_reported"] < 1.1
    # Two payloads send the same entries.
    assert 1 < found[buckets]["sent_bytes"] / found[sparse]["sent_bytes"] < 1.2
    assert found["local"]["sent_bytes"] < 0.05 * found[sparse]["sent_bytes"]
    assert found["dense"]["exchange_share"] > 0
    for method in ("dense", buckets):
        folder = tmp_path / "profile/unshaped/20000" / method.replace(":", "_")
        [trace] = folder.rglob("*.xplane.pb")
        assert trace.stat().st_size > 0
    assert summary["networks"]["unshaped"]["bulk_bits_per_second"] > 0


STUDY = {
    "num_workers": 2,
    "batch_size": 3,
    "rounds": 6,
    "evaluate_every": 3,
    "density": 0.001,
}


def study_flags(**others):
    return [f"--{name}={value}" for name, value in {**STUDY, **others}.items()]


def study_values():
    """The flags of a study of `dense`, parsed."""
    values = flags.FlagValues()
    for name, value in {**STUDY, "momentum": 0.9}.items():
        flags.DEFINE_float(name, value, "", flag_values=values)
    flags.DEFINE_string("model", "resnet8", "", flag_values=values)
    flags.DEFINE_list("methods", ["dense"], "", flag_values=values)
    flags.DEFINE_list("networks", ["5ms"], "", flag_values=values)
    values(["program"])
    return values


def test_composed_times():
    curves = {
        "dense": ([3, 6], np.array([0.4, 0.8])),
        "topk": ([3, 6], np.array([0.5, 0.7])),
    }
    milliseconds = {"dense": 100, "topk": 10}
    assert time_to_accuracy.compose(curves, milliseconds, [0.5, 1.0]) == {
        "dense": [pytest.approx(0.3), pytest.approx(0.6)],
        "topk": [pytest.approx(0.03), None],
    }


def test_published_times_are_those_that_were_measured():
    """Of the steps, with the accuracies of the kept runs."""
    results = paths.ROOT / "docs" / "results"
    path = results / "time_to_accuracy" / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    runs = kept_runs.read(
        results / "cifar10_long_iid" / "runs.jsonl",
        {"rounds": 6000},
        summary["methods"],
    )
    curves = {
        m: kept_runs.mean_curve(of_seeds) for m, (_, of_seeds) in runs.items()
    }
    summary["seconds"] = {
        name: time_to_accuracy.compose(
            curves,
            time_to_accuracy.milliseconds_of(records),
            summary["targets"],
        )
        for name, records in summary["records"].items()
    }
    table = time_to_accuracy.markdown_table(summary)
    page = (paths.ROOT / "docs" / "results.md").read_text("utf-8")
    assert table in page.replace("**", "")


def test_published_training_of_real_workers():
    path = paths.ROOT / "docs" / "results" / "time_to_accuracy" / "whole.json"
    summary = json.loads(path.read_text("utf-8"))
    [(whole, found)] = summary["whole"].items()
    network, method = whole.split(":")
    milliseconds = summary["records"][network][method]["milliseconds"]
    composed = summary["config"]["rounds"] * milliseconds / 1e3
    page = (paths.ROOT / "docs" / "results.md").read_text("utf-8")
    assert (
        f"lasted {found['seconds']:.0f} s. Composed they last {composed:.0f} s"
    ) in " ".join(page.split())
    assert abs(composed / found["seconds"] - 1) < 0.1
    accuracy = f"{found['accuracy']:.4f}".lstrip("0")
    assert f"accuracy of the real workers was {accuracy}" in " ".join(
        page.split()
    )


def test_times_of_other_steps_are_refused(tmp_path):
    path = tmp_path / "summary.json"
    records = {"5ms": {"dense": {"milliseconds": 7.0}}}
    values = study_values()
    summary = {
        "config": values.flag_values_dict(),
        "records": records | {"1gbit": {}},
    }
    path.write_text(json.dumps(summary), "utf-8")
    summary = time_to_accuracy.read_times(path, values)
    assert summary["records"] == records
    values.networks = ["5ms", "1gbit"]
    with pytest.raises(ValueError, match="without 1gbit:dense"):
        time_to_accuracy.read_times(path, values)
    values.density = 0.5
    with pytest.raises(ValueError, match="`density` must be that of the"):
        time_to_accuracy.read_times(path, values)


@old_versions.needs_data_sets
def test_time_to_accuracy(needs_network, tmp_path):
    """A whole training reaches the accuracy of the simulated one."""
    study = fork_server.run_one(
        run_with_mock_data.__file__,
        [
            *("60", str(paths.EXAMPLES / "studies" / "cifar10_long.py")),
            *study_flags(
                methods="dense,topk_sign",
                learning_rates=0.1,
                output_dir=tmp_path,
            ),
        ],
    )
    assert study.returncode == 0, study.stderr[-3000:]
    lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    _, simulated = [json.loads(line)["result"] for line in lines]
    result = fork_server.run_one(
        run_with_mock_data.__file__,
        [
            *("60", "benchmarks.cluster.time_to_accuracy"),
            *study_flags(
                methods="dense,topk_sign",
                networks="unshaped",
                timed_rounds=1,
                seconds_per_turn=0.1,
                targets="0.9,0.99",
                whole="unshaped:topk_sign",
                runs=tmp_path / "runs.jsonl",
                output_dir=tmp_path,
            ),
        ],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Left behind" not in result.stderr
    assert "composed" in result.stdout
    path = tmp_path / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    assert (tmp_path / "time.png").exists()
    steps = summary["records"]["unshaped"]
    assert set(steps) == {"dense", "topk_sign", "local"}
    assert steps["topk_sign"]["sent_bytes"] < steps["dense"]["sent_bytes"] / 50
    whole = summary["whole"]["unshaped:topk_sign"]
    assert whole["accuracy"] == simulated["accuracy"][-1]

    result = fork_server.run_one(
        run_with_mock_data.__file__,
        [
            *("60", "benchmarks.cluster.time_to_accuracy"),
            *study_flags(
                methods="dense,topk_sign",
                networks="unshaped",
                targets="0.9,0.99",
                runs=tmp_path / "runs.jsonl",
                times=path,
                output_dir=tmp_path / "again",
            ),
        ],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    again = json.loads((tmp_path / "again" / "summary.json").read_text("utf-8"))
    assert again["seconds"] == summary["seconds"]


@pytest.mark.slow
def test_nothing_is_left_after_sigterm(needs_network, tmp_path):
    process = start(tmp_path, "--methods=dense")
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert "Started" in process.stdout.readline()
        assert namespaces.leftovers(process.pid)
        workers = namespaces.children(process.pid)
        assert len(workers) >= 2
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Left behind" not in errors
    assert not namespaces.leftovers(process.pid)
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_bytes_of_decentralised_replicas(needs_network, tmp_path):
    """`wire_report` says what neighbours send, within a few per cent."""
    process = subprocess.Popen(
        [
            sys.executable,
            *("-m", "benchmarks.cluster.gossip_bytes"),
            *("--steps=8", "--timeout=1400", f"--output_dir={tmp_path}"),
        ],
        cwd=paths.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=1500)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors[-3000:]
    assert not namespaces.leftovers(process.pid)
    results = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    results = results["results"]
    for name in (
        "one-peer, 8 bits",
        "ring",
        "ring, cross gradients of signs",
        "cliques",
    ):
        found = results[name]
        ratio = found["counted_bytes"] / found["reported_bytes"]
        assert 1 <= ratio < 1.05, name
    # A byte for each number, to one neighbour; four bytes, to two.
    reported = {name: r["reported_bytes"] for name, r in results.items()}
    answers = reported["ring, cross gradients of signs"] - reported["ring"]
    # A bit for 32, and the scales.
    assert 1 < answers / reported["ring"] * 32 < 1.05
    assert 7.9 < reported["ring"] / reported["one-peer, 8 bits"] < 8.1


# As after a signal between the start of a process and its being known.
LOSES_TRACK = """
import os, subprocess
from benchmarks.cluster import namespaces
pid = os.getpid()
name = f"{namespaces.PREFIX}-{pid}-w0"
subprocess.run(["ip", "netns", "add", name], check=True)
lost = [
    subprocess.Popen(["sleep", "100"]),
    subprocess.Popen(["ip", "netns", "exec", name, "sleep", "100"]),
    subprocess.Popen(["true"]),
]
assert len(namespaces.children(pid)) == 3
assert namespaces.leftovers(pid) == [name]
namespaces.remove_rest()
print(namespaces.children(pid), namespaces.leftovers(pid))
"""


def test_what_no_one_knows_is_removed(needs_network):
    printed = subprocess.check_output(
        [sys.executable, "-c", LOSES_TRACK],
        cwd=paths.ROOT,
        text=True,
        timeout=60,
    )
    assert printed == "[] []\n"


def test_without_root_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert step.main(["step.py"]) == 2
    assert "root is needed" in capsys.readouterr().err
