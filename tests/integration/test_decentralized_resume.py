"""Decentralised replicas resume to the bit, and others from the mean."""

import itertools
import os
import shutil

import decentralized_resume_program as program
import keras
import multi_worker_launcher
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import backup_files


def backup_path(folder, epoch):
    return backup_files.Folder(folder).path(backup_files.Position(epoch))


def differing(first, second):
    """The names of all that two replicas do not have in common."""
    return {name for name in first if first[name] != second[name]}


def damage(path, value):
    """Changes a bit of each place at which a file has these bytes."""
    with open(path, "r+b") as file:
        data = file.read()
        assert value in data
        file.seek(0)
        file.write(data.replace(value, bytes([value[0] ^ 1]) + value[1:]))


@pytest.mark.parametrize(
    "n, rule, inner, every_steps",
    [
        (2, "tracker", "momentum", program.EVERY_STEPS),
        (0, "EF21", "momentum", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (3, "CompNGC", "momentum", program.EVERY_STEPS),
                (2, "EF21", "momentum", program.EVERY_STEPS),
                (3, "Accumulate", "adam", program.EVERY_STEPS),
                *itertools.product(
                    (2, 3), program.RULES, program.INNER, (None, 1)
                ),
            ]
        ),
    ],
)
def test_goes_on_to_the_bit(
    n, rule, inner, every_steps, mirrored, tmp_path, caplog
):
    strategy = mirrored(n)
    whole = program.make_model(strategy, rule, inner)
    expected_logs = program.fit(whole)
    expected = program.kept(whole)
    model = program.make_model(strategy, rule, inner)
    program.fit_until_stopped(model, tmp_path, every_steps)
    model = program.make_model(strategy, rule, inner)
    with caplog.at_level("INFO", "tf_regtopk"):
        logs = program.resume(model, tmp_path)
    assert "Resuming" in caplog.text
    assert ("steps of the epoch" in caplog.text) == (every_steps is not None)
    assert program.kept(model) == expected
    assert logs == {name: v[1:] for name, v in expected_logs.items()}
    assert "THE FILE HOLDS" not in caplog.text
    assert "new optimizer" not in caplog.text


def saved_replicas(strategy, folder, num_epochs=1, **kwargs):
    """What the replicas of a run have in its newest backup."""
    model = program.make_model(strategy, **kwargs)
    program.back_up(model, folder, num_epochs)
    return program.kept(model)


def assert_is_mean(model, saved):
    """All replicas have the mean of what was saved, of all variables."""
    of_replicas = program.kept(model)
    for name in saved[0]:
        if name == "kept":
            continue
        expected = [replica[name] for replica in saved]
        if all(isinstance(value, int) for value in np.ravel(expected)):
            expected = expected[:1]
        for replica in of_replicas:
            np.testing.assert_allclose(
                replica[name],
                np.mean(expected, axis=0),
                rtol=1e-6,
                atol=1e-7,
                err_msg=name,
            )
            assert replica[name] == of_replicas[0][name]


@pytest.mark.parametrize("rule", ["EF21", "Accumulate"])
@pytest.mark.parametrize("n", [0, 3])
def test_another_number_starts_from_the_mean(
    n, rule, mirrored, tmp_path, caplog
):
    saved = saved_replicas(mirrored(2), tmp_path, rule=rule)
    caplog.clear()
    model = program.make_model(mirrored(n), rule, seed=5)
    assert tf_regtopk.Backup(tmp_path).restore(model) == 1
    assert f"was 2 and is {n or 1} now: all start" in caplog.text
    assert_is_mean(model, saved)
    if n:
        state = model.optimizer.save_state()
        num_variables = len(model.optimizer.variables)
        weights = np.concatenate(
            [v.numpy().ravel() for v in model.trainable_variables]
        )
        initial = {"EF21": weights, "Accumulate": 0 * weights}[rule]
        for arrays in state.replicas.values():
            zeroed, of_neighbours, *others = arrays[num_variables:]
            np.testing.assert_array_equal(of_neighbours, initial)
            assert not np.any([zeroed, *map(np.any, others)])
    assert model.optimizer.replicas_agree
    if not n:
        # What a single replica saves is checked by its own weights.
        path = tmp_path / "m.weights.h5"
        model.save_weights(path)
        with tf_regtopk.load_scope(path, mirrored(n), model) as own_path:
            model.load_weights(own_path)


@pytest.mark.slow
def test_another_number_goes_on(mirrored, tmp_path):
    program.fit_until_stopped(program.make_model(mirrored(2)), tmp_path)
    model = program.make_model(mirrored(3))
    program.resume(model, tmp_path)
    assert model.optimizer.iterations.numpy() == program.EPOCHS * program.STEPS


def test_a_single_replica_becomes_several(mirrored, tmp_path, caplog):
    [saved] = saved_replicas(mirrored(0), tmp_path, inner="adam")
    model = program.make_model(mirrored(2), inner="adam", seed=5)
    tf_regtopk.Backup(tmp_path).restore(model)
    assert "was 1 and is 2 now: all start" in caplog.text
    for replica in program.kept(model):
        assert differing(replica, saved) == {"kept"}


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_one_bit_of_the_second_replica(what, mirrored, tmp_path, caplog):
    """All goes on from the backup before; without one, nothing changes."""
    strategy = mirrored(2)
    [_, second] = saved_replicas(strategy, tmp_path, num_epochs=2)
    names = [name for name in second if name.startswith(what)]
    [largest] = [
        n
        for n in names
        if np.size(second[n]) == 20  # Of the first kernel.
    ]
    value = np.float32(second[largest]).tobytes()
    damage(backup_path(tmp_path, 2), value)
    model = program.make_model(strategy)
    assert tf_regtopk.Backup(tmp_path).restore(model) == 1
    assert "because the backup of epoch 2 cannot" in caplog.text
    assert "with another checksum" in caplog.text
    before = program.kept(model)
    path = backup_path(tmp_path, 2)
    os.remove(backup_path(tmp_path, 1))
    os.rename(tmp_path / f"damaged.{os.path.basename(path)}", path)
    with pytest.raises(ValueError, match="with another checksum"):
        tf_regtopk.Backup(tmp_path).restore(model)
    assert program.kept(model) == before


@pytest.mark.parametrize("rule", ["Accumulate", "none"])
def test_another_rule_is_refused(rule, mirrored, tmp_path):
    saved_replicas(mirrored(2), tmp_path)
    model = program.make_model(mirrored(2), rule)
    before = program.kept(model)
    with pytest.raises(
        ValueError, match="must be of a `Dec.* with error_feedback="
    ):
        tf_regtopk.Backup(tmp_path).restore(model)
    assert program.kept(model) == before


def test_a_tracker_needs_what_was_tracked(mirrored, tmp_path):
    saved_replicas(mirrored(2), tmp_path, rule="none")
    model = program.make_model(mirrored(2), "tracker")
    with pytest.raises(ValueError, match="must be of a `Dec.* with mixing_rul"):
        tf_regtopk.Backup(tmp_path).restore(model)


def test_cross_gradients_need_what_was_rounded_off(
    mirrored, tmp_path, monkeypatch
):
    """And the same neighbours; where nothing is kept, all fits."""
    saved_replicas(mirrored(3), tmp_path, rule="CompNGC")
    with pytest.raises(ValueError, match="must be of a `Dec.* with cross_grad"):
        tf_regtopk.Backup(tmp_path).restore(
            program.make_model(mirrored(3), "none")
        )
    rule = program.RULES["CompNGC"]
    for other, message in (
        (dict(topology=tf_regtopk.Complete()), "with topology="),
        (
            dict(cross_gradients=tf_regtopk.CrossGradients(alpha=0.5)),
            "with cross_gradients=",
        ),
        (
            dict(
                cross_gradients=tf_regtopk.CrossGradients(
                    0.5, rule["cross_gradients"].codec
                )
            ),
            "with cross_gradients=",
        ),
    ):
        monkeypatch.setitem(program.RULES, "CompNGC", {**rule, **other})
        with pytest.raises(ValueError, match=message):
            tf_regtopk.Backup(tmp_path).restore(
                program.make_model(mirrored(3), "CompNGC")
            )


def test_the_file_of_another_optimizer_is_refused(tmp_path):
    models = []
    for make in (
        lambda: tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1)),
        lambda: tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD(0.1)),
    ):
        models.append(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        )
        models[-1].compile(make(), "mse")
        models[-1].optimizer.build(models[-1].trainable_variables)
    sparsified, decentralized = models
    sparsified.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="must have variables of the shapes"):
        decentralized.load_weights(tmp_path / "m.weights.h5")


def test_other_neighbours_are_refused_where_they_are_summed_up(
    mirrored, tmp_path, monkeypatch
):
    """By `EF21`; other rules take any."""
    complete = tf_regtopk.Complete()
    for rule in ("EF21", "Accumulate"):
        saved_replicas(mirrored(2), tmp_path / rule, rule=rule)
        monkeypatch.setitem(
            program.RULES, rule, {**program.RULES[rule], "topology": complete}
        )
    with pytest.raises(
        ValueError, match="of a `DecentralizedOptimizer` with topo"
    ):
        tf_regtopk.Backup(tmp_path / "EF21").restore(
            program.make_model(mirrored(2), "EF21")
        )
    model = program.make_model(mirrored(2), "Accumulate")
    assert tf_regtopk.Backup(tmp_path / "Accumulate").restore(model) == 1


def test_a_checkpoint_of_several_replicas_is_refused(mirrored, tmp_path):
    model = program.make_model(mirrored(2))
    checkpoint = tf.train.Checkpoint(model=model)
    with pytest.raises(ValueError, match="Train with `tf_regtopk.Backup`"):
        checkpoint.save(tmp_path / "checkpoint")


def test_save_weights_says_that_it_saves_one(mirrored, tmp_path, caplog):
    model = program.make_model(mirrored(2))
    program.change(model, 0)
    with tf_regtopk.averaged(model):
        model.save_weights(tmp_path / "average.weights.h5")
    assert "THE FILE HOLDS" not in caplog.text
    model.save_weights(tmp_path / "first.weights.h5")
    assert "THE FILE HOLDS THE WEIGHTS OF ONE REPLICA" in caplog.text


def test_zeroed_gradients_are_counted_on(mirrored, tmp_path, caplog):
    """And `fit` warns of them."""
    strategy = mirrored(2)
    model = program.make_model(strategy)
    optimizer = model.optimizer

    def of_replica():
        replica = tf.distribute.get_replica_context()
        rank = tf.cast(replica.replica_id_in_sync_group, tf.float32)
        optimizer.apply(
            [tf.zeros(v.shape) / rank for v in model.trainable_variables],
            model.trainable_variables,
        )

    strategy.run(tf.function(of_replica, autograph=False))
    assert optimizer.zeroed_gradients == [1, 0]
    backup = tf_regtopk.Backup(tmp_path)
    with caplog.at_level("WARNING", "tf_regtopk"):
        program.fit(model, [backup], backup.restore(model), epochs=1)
    assert "were taken as 0: [1, 0] of the replicas" in caplog.text
    model = program.make_model(strategy)
    tf_regtopk.Backup(tmp_path).restore(model)
    assert model.optimizer.zeroed_gradients == [1, 0]


def test_others_of_the_model_must_agree(mirrored, tmp_path):
    """Only the weights of a `DecentralizedOptimizer` may differ."""
    strategy = mirrored(2)
    with strategy.scope():
        own, common = (keras.layers.Dense(2) for _ in range(2))
        model = keras.Sequential([keras.Input((2,)), own, common])
        model.compile(
            tf_regtopk.DecentralizedOptimizer(
                keras.optimizers.SGD(0.1), program.RING
            ),
            "mse",
        )
        model.optimizer.build(own.trainable_variables)
        model.other = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1))
        model.other.build(common.trainable_variables)
    backup = tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    backup.set_model(model)
    backup.on_train_begin()
    for layer in (own, common):
        backup.on_epoch_begin(int(layer is common))
        [_, second] = strategy.experimental_local_results(layer.kernel.value)
        second.assign_add(tf.ones(second.shape))
        if layer is common:
            with pytest.raises(RuntimeError, match="must have the same"):
                backup.on_epoch_end(1)
        else:
            backup.on_epoch_end(0)
    expected = second.numpy() - 1
    tf_regtopk.Backup(tmp_path).restore(model)
    kernels = strategy.experimental_local_results(own.kernel.value)
    np.testing.assert_allclose(
        kernels[1].numpy() - kernels[0].numpy(), 1, rtol=1e-6
    )
    np.testing.assert_array_equal(second.numpy(), expected)


# ----- Two workers -----


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The folder of two workers' runs, and what each found in two starts."""
    folder = tmp_path_factory.mktemp("decentralized_resume")
    copy = folder / "stopped"
    results = {}
    for action in ("save", "resume"):
        results[action] = multi_worker_launcher.run_workers(
            program.__file__,
            num_workers=2,
            directory=folder,
            timeout=300,
            args=[action, str(folder)],
        )
        if action == "save":
            for name in ("run", "other run"):
                shutil.copytree(folder / name, copy / name)
    return copy, results


def test_two_workers_resume_to_the_bit(workers):
    _, results = workers
    for saved, resumed in zip(results["save"], results["resume"], strict=True):
        assert resumed["end"] == saved["end"]
        for name, values in saved["logs"].items():
            assert resumed["logs"][name] == values[1:], name


def test_the_replicas_of_these_runs_differ(workers):
    """In weights, moving statistics, slots, and what gossip keeps."""
    [first], [second] = (result["run"] for result in workers[1]["save"])
    differ = differing(first, second)
    model = program.make_model(tf.distribute.get_strategy())
    own = {
        name
        for name, variable in program.named_variables(model).items()
        if len(variable.shape) and "seed" not in variable.path
    }
    assert len(own) == 8 + 6  # Weights and moving statistics, and momenta.
    assert own <= differ
    assert "kept" in differ
    # Not so the numbers of steps.
    assert "optimizer 0" not in differ


def test_workers_of_two_runs_do_not_go_on(workers):
    for result in workers[1]["resume"]:
        assert "must be of the same run" in result["two runs"]


def of_workers(workers, name="run"):
    return [
        replica for result in workers[1]["save"] for replica in result[name]
    ]


def test_workers_become_replicas_of_one_process(workers, mirrored):
    model = program.make_model(mirrored(2), seed=5)
    tf_regtopk.Backup(workers[0] / "run").restore(model)
    assert program.kept(model) == of_workers(workers)


def test_workers_become_another_number(workers, mirrored):
    model = program.make_model(mirrored(3), seed=5)
    tf_regtopk.Backup(workers[0] / "run").restore(model)
    assert_is_mean(model, of_workers(workers))


@pytest.mark.parametrize("n", [2, 3])
def test_files_of_two_runs_are_refused(n, workers, mirrored, tmp_path):
    folder = tmp_path / "mixed"
    for worker in range(2):
        shutil.copytree(
            program.mixed(workers[0], worker),
            folder,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(f"*.worker-{1 - worker}-*"),
        )
    model = program.make_model(mirrored(n))
    before = program.kept(model)
    with pytest.raises(ValueError, match="files must hold all 2 replicas"):
        tf_regtopk.Backup(folder).restore(model)
    assert program.kept(model) == before


def test_a_file_of_one_worker_alone_is_refused(workers, mirrored, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(
        workers[0] / "run",
        folder,
        ignore=shutil.ignore_patterns("*.worker-1-*"),
    )
    for n in (2, 3):
        with pytest.raises(FileNotFoundError, match="must be there of every"):
            tf_regtopk.Backup(folder).restore(program.make_model(mirrored(n)))
