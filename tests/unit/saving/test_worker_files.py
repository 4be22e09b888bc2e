"""Files of several workers."""

import types
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files


def cluster(number, num_workers, chief=False):
    """What looks like the strategy of one worker."""
    names = {"worker": [f"host{i}:1" for i in range(num_workers - chief)]}
    if chief:
        names["chief"] = ["host:1"]
    task = ("worker", number - chief) if number or not chief else ("chief", 0)
    return types.SimpleNamespace(
        cluster_resolver=tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(names), task_type=task[0], task_id=task[1]
        )
    )


@pytest.mark.parametrize(
    "path, expected",
    [
        ("a.b/m.keras", "a.b/m.worker-1-of-3.keras"),
        ("m.weights.h5", "m.worker-1-of-3.weights.h5"),
        ("m-{epoch:02d}.h5", "m-{epoch:02d}.worker-1-of-3.h5"),
        ("folder/ckpt.1", "folder/ckpt.1.worker-1-of-3"),
    ],
)
def test_worker_path(path, expected, mirrored):
    assert tf_regtopk.worker_path(path, cluster(1, 3)) == expected
    assert tf_regtopk.worker_path(path, cluster(1, 3, chief=True)) == expected
    first = tf_regtopk.worker_path(path, cluster(0, 3, chief=True))
    assert first == expected.replace("-1-", "-0-")
    for strategy in (mirrored(0), mirrored(2), cluster(0, 1)):
        assert tf_regtopk.worker_path(path, strategy) == path


def test_a_worker_that_saves_alone_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(worker_files._Told, "path_was_given", False)
    monkeypatch.setattr(worker_files._Told, "warned", False)
    all_of_two = saved_state.SavedState({}, {}, 2, {0: [], 1: []})
    worker_files.warn_if_alone(all_of_two)
    assert not caplog.text
    some_of_four = all_of_two._replace(num_replicas=4)
    for _ in range(2):
        worker_files.warn_if_alone(some_of_four)
    [record] = caplog.records
    assert "[0, 1] of 4" in record.message
    assert "worker_path" in record.message


def test_whoever_knows_of_worker_paths_is_not_told(monkeypatch, caplog):
    monkeypatch.setattr(worker_files._Told, "path_was_given", False)
    monkeypatch.setattr(worker_files._Told, "warned", False)
    tf_regtopk.worker_path("m.keras", cluster(0, 2))
    worker_files.warn_if_alone(saved_state.SavedState({}, {}, 2, {0: []}))
    assert not caplog.text


def test_the_newest_run_counts(tmp_path):
    def touch(seconds, number, num_workers):
        path = tf_regtopk.worker_path(
            tmp_path / "m.keras", cluster(number, num_workers)
        )
        with open(path, "w"):
            pass
        worker_files.os.utime(path, (seconds, seconds))

    def find(number, num_workers):
        files = worker_files.find_files(
            tmp_path / "m.keras", cluster(number, num_workers)
        )
        return [worker_files.os.path.basename(file) for file in files]

    assert find(0, 2) == []
    touch(1, 0, 3)
    touch(2, 2, 3)
    # Not all, but this worker's own; the others' may be elsewhere.
    assert find(0, 2) == [] and find(1, 3) == []
    assert len(find(0, 3)) == len(find(2, 3)) == 3
    touch(3, 1, 3)
    assert (
        find(0, 2)
        == find(4, 5)
        == [f"m.worker-{i}-of-3.keras" for i in range(3)]
    )
    touch(4, 0, 1)
    assert find(0, 2) == find(0, 3) == ["m.keras"]
    touch(5, 0, 2)
    touch(5, 1, 2)
    assert find(0, 3) == [f"m.worker-{i}-of-2.keras" for i in range(2)]


def test_other_files_are_read_only_where_needed(tmp_path):
    saved = saved_state.SavedState({}, {"step": 1}, 2, {0: [np.zeros(1)]})
    # Outside of a scope there are none.
    assert worker_files.complete(saved, [0, 1], 2) is saved
    damaged = tmp_path / "m.worker-1-of-2.keras"
    damaged.write_text("not a file of Keras")
    with worker_files.reading([str(damaged)]) as loaded:
        assert worker_files.complete(saved, [0], 2) is saved
        with pytest.raises(zipfile.BadZipFile):
            worker_files.complete(saved, [0, 1], 2)
    assert len(loaded) == 2 and all(found is saved for found in loaded)
