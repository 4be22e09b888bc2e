"""A run that is saved and resumed, by as many replicas or by others."""

import json
import os
import shutil

import keras
import multi_worker_launcher
import numpy as np
import pytest
import resume_program
import tensorflow as tf

import tf_regtopk

TIMEOUT = 240
WAYS = resume_program.WAYS


def launch(num_workers, directory, *args):
    return multi_worker_launcher.run_workers(
        resume_program.__file__, num_workers, directory, TIMEOUT, args=args
    )


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def saved(directory):
    """Function from a number of replicas to what its run has said and saved."""
    runs = {}

    def run(num_replicas, strategy):
        if num_replicas not in runs:
            files = directory / "saved" / str(num_replicas)
            os.makedirs(files)
            result = resume_program.train_and_save(strategy, files)
            runs[num_replicas] = as_json(result), files
        return runs[num_replicas]

    return run


@pytest.fixture(scope="module")
def resumed(directory, saved, mirrored):
    """Function to what a fresh process has made of the files of a run."""
    results = {}

    def run(num_replicas):
        if num_replicas not in results:
            _, files = saved(num_replicas, mirrored(num_replicas))
            copy = directory / "resumed" / str(num_replicas)
            shutil.copytree(files, copy / str(num_replicas))
            [found] = launch(0, directory, "resume", copy)
            results.update({num_replicas: found[str(num_replicas)]})
        return results[num_replicas]

    return run


@pytest.mark.parametrize(
    "num_replicas", [0, 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_resumes_to_the_bit(num_replicas, saved, resumed, mirrored):
    expected = saved(num_replicas, mirrored(num_replicas))[0]["end"]
    for way in resume_program.ways(mirrored(num_replicas)):
        assert resumed(num_replicas)[way] == expected, way
    # The replicas, and the numbers that they keep, do differ.
    assert len(expected["replicas"]) == max(1, num_replicas)
    assert len(set(map(str, expected["replicas"].values()))) == len(
        expected["replicas"]
    )
    assert len(set(expected["weights_of_replicas"])) == 6


def test_keras_still_forgets_random_states(resumed):
    """Else `Backup` need not save them, nor the other tests set them."""
    assert resumed(2)["kept_by_keras"] == [[7, 0]]


def assert_total_is_kept(result, half_ways):
    """`result`: for each process what it has loaded, for each way."""
    expected = np.sum([half_way["total"] for half_way in half_ways], axis=0)
    size = np.abs(expected).max()
    assert size > 0
    assert {*resume_program.FEW_WAYS} <= {*result[0]}
    for way in {*WAYS} & {*result[0]}:
        loaded = [r[way] for r in result]
        total = np.sum([r["total"] for r in loaded], axis=0)
        np.testing.assert_allclose(total, expected, rtol=0, atol=1e-6 * size)
        errors = [e for r in loaded for e in r["errors"]]
        assert all(error == errors[0] for error in errors)
        for r in loaded:
            assert len(r["warnings"]) == 1, way
            assert "spread evenly" in r["warnings"][0]
            assert r["is_memory_fresh"]
            assert r["weights"] == half_ways[0]["weights"]
            assert r["step"] == 6
    for r in result:
        assert len(set(r["end"])) == 6  # All replicas have the same weights.


@pytest.mark.slow
@pytest.mark.parametrize("old, new", [(3, 2), (2, 3), (3, 0), (0, 2)])
def test_another_number_of_replicas(old, new, saved, mirrored):
    result, files = saved(old, mirrored(old))
    loaded = resume_program.load_another_world(mirrored(new), files)
    assert_total_is_kept([as_json(loaded)], [result["half_way"]])


@pytest.fixture(scope="module")
def workers(directory):
    """What 2 workers have saved, and what 3 made of it, saved and resumed.

    Gives three lists of the results of all workers.
    """
    of_2, of_3 = directory / "workers_2", directory / "workers_3"
    saved_by_2 = launch(2, directory, "save", of_2)
    saved_by_3 = launch(3, directory, "save", of_3, of_2 / "workers")
    copy = shutil.copytree(of_3, directory / "resumed_by_3")
    return saved_by_2, saved_by_3, launch(3, directory, "resume", copy)


def test_workers_resume_to_the_bit(workers):
    _, saved, resumed = workers
    ends = [result["workers"]["end"] for result in saved]
    assert len({str(end["replicas"]) for end in ends}) == 3
    for result, end in zip(resumed, ends, strict=True):
        for way in resume_program.FEW_WAYS:
            assert result["workers"][way] == end, way
        for name in ("weights_of_replicas", "optimizer"):
            assert end[name] == ends[0][name]


def half_ways(workers):
    return [result["workers"]["half_way"] for result in workers[0]]


def test_another_number_of_workers(workers):
    loaded = [result["another world"] for result in workers[1]]
    assert_total_is_kept(loaded, half_ways(workers))


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [0, 3])
def test_one_process_goes_on_from_workers(
    num_replicas, workers, directory, mirrored
):
    loaded = resume_program.load_another_world(
        mirrored(num_replicas), directory / "workers_2" / "workers"
    )
    assert_total_is_kept([as_json(loaded)], half_ways(workers))


def test_a_file_of_one_worker_alone(workers, directory, mirrored):
    """Is good for inference, and says how to load those of all."""
    path = directory / "workers_2" / "workers" / "alone.keras"
    with pytest.warns(UserWarning, match=r"replicas \[1\] .*load_scope"):
        model = keras.saving.load_model(path)
    np.testing.assert_allclose(
        resume_program.total_error(model), half_ways(workers)[0]["total"]
    )
    with (
        pytest.raises(ValueError, match="none with the replicas"),
        tf_regtopk.load_scope(path, mirrored(0)) as own_path,
    ):
        keras.saving.load_model(own_path)


def test_as_many_replicas_go_on_to_the_bit_from_workers(
    workers, directory, mirrored
):
    """Two workers' replicas on one machine: the errors are as they were."""
    with mirrored(2).scope():
        model = resume_program.make_model(mirrored(2))
    path = directory / "workers_2" / "workers" / "m.keras"
    with tf_regtopk.load_scope(path, mirrored(2), model) as own_path:
        model.load_weights(own_path)
    total = resume_program.total_error(model)
    expected = np.sum([h["total"] for h in half_ways(workers)], axis=0)
    np.testing.assert_array_equal(total, expected)
    errors = [a[0] for a in model.optimizer.save_state().replicas.values()]
    assert not np.array_equal(*errors)


def test_checkpoint_waits_until_the_optimizer_is_built(saved, mirrored):
    result, files = saved(2, mirrored(2))
    with mirrored(2).scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.Adam(0.05),
            tf_regtopk.RegTopK(0.25, mu=1.0),
        )
    model = resume_program.make_model(mirrored(2))
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(
        str(files / "checkpoint")
    )
    optimizer.build(model.trainable_variables)
    model.optimizer = optimizer
    np.testing.assert_array_equal(
        resume_program.total_error(model), result["half_way"]["total"]
    )
