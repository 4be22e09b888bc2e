"""Places that a cluster tells, by `TF_CONFIG` or by Slurm."""

import json
import os

import pytest
import tensorflow as tf

from tf_regtopk.launch import cluster

CONFIG = {
    "cluster": {"worker": ["b:1", "c:1"], "chief": ["a:1"]},
    "task": {"type": "worker", "index": 0},
}


def test_place_in_tf_config():
    place = cluster.place_in_tf_config(json.dumps(CONFIG))
    assert (place.name, place.number) == ("worker 0", 1)
    assert place.peers == {"chief 0": "a:1", "worker 1": "c:1"}
    # The worker gets what was told.
    assert json.loads(place.tf_config) == CONFIG


@pytest.mark.parametrize(
    "tf_config",
    [
        "{",
        "[]",
        "{}",
        '{"cluster": {"worker": ["host:1"]}, '
        '"task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["host:1"]}, '
        '"task": {"type": "evaluator", "index": 0}}',
        '{"cluster": {"worker": "host:1"}, '
        '"task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [["host:1"]]}, '
        '"task": {"type": "worker", "index": 0}}',
    ],
)
def test_refuses_a_bad_tf_config(tf_config):
    with pytest.raises(ValueError, match="`TF_CONFIG` must be"):
        cluster.place_in_tf_config(tf_config)


def test_addresses_by_number():
    """As `tf.train.ClusterSpec` takes them too."""
    config = {
        "cluster": {"worker": {"1": "b:1", "0": "a:1"}},
        "task": {"type": "worker", "index": 1},
    }
    place = cluster.place_in_tf_config(json.dumps(config))
    assert (place.name, place.number) == ("worker 1", 1)
    assert place.peers == {"worker 0": "a:1"}


def test_what_is_told(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.told_place() is None
    monkeypatch.setenv("TF_CONFIG", json.dumps(CONFIG))
    place, source = cluster.told_place()
    assert (place.number, source) == (1, "`TF_CONFIG`")


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Function that puts this process into a Slurm step, without GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # No nvidia-smi.

    def enter(nodes, tasks_per_node, num_tasks, number, node, local_number):
        for name, value in {
            "SLURM_JOB_ID": 4007,
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
        ("a01", "2", {"a01": 2}),
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
    seen = []
    for number, (node, local) in enumerate(tasks):
        slurm(nodes, tasks_per_node, len(tasks), number, node, local)
        place, source = cluster.told_place(2000)
        assert source == "job 4007 of Slurm"
        assert place.addresses[place.name] == f"{node}:{2000 + local}"
        assert place.name == f"worker {place.number}"
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        seen.append((place.number, tuple(place.addresses.values())))
    assert sorted(number for number, _ in seen) == list(range(len(tasks)))
    [addresses] = {addresses for _, addresses in seen}
    assert set(addresses) == {f"{node}:{2000 + local}" for node, local in tasks}


def test_ports_of_a_job(slurm):
    slurm("n[9-10]", "1(x2)", 2, 0, "n9", 0)
    place, _ = cluster.told_place()
    assert place.addresses["worker 0"].endswith(f":{12000 + 7 * 20}")


def test_what_tensorflows_own_resolver_needs(slurm):
    """If one of these fails, `place_in_slurm` can do without a correction."""
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
    with pytest.raises(ValueError, match="must be tasks"):
        cluster.told_place(2000)


def test_refuses_a_host_that_is_not_in_the_step(slurm):
    slurm("n[9-10]", "1(x2)", 2, 0, "n11", 0)
    with pytest.raises(ValueError, match="'SLURMD_NODENAME': 'n11'"):
        cluster.told_place(2000)
