"""`Backup`: which epoch the workers go on with, and writes cut short."""

import errno
import os
import pathlib
import shutil
import signal

import fork_server
import keras
import numpy as np
import paths
import pytest
import resume_program
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import backup as backup_lib
from tf_regtopk.callbacks import backup_contents
from tf_regtopk.callbacks import backup_files
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib


def make(strategy, density=0.2):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(3),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1, momentum=0.9),
                tf_regtopk.RegTopK(density),
            ),
            "mse",
        )
    return model


def back_up(backup, model, num_epochs):
    """What `fit` calls; gives what was saved after each epoch."""
    backup.set_model(model)
    backup.on_train_begin()
    saved = []
    for epoch in range(num_epochs):
        backup.on_epoch_begin(epoch)
        resume_program.change(model, epoch)
        backup.on_epoch_end(epoch)
        saved.append(resume_program.fingerprint(model))
    return saved


def test_the_last_two_epochs_are_kept(mirrored, tmp_path):
    model = make(mirrored(2))
    backup = tf_regtopk.Backup(tmp_path / "backup")
    assert backup.restore(model) == 0
    saved = back_up(backup, model, 4)
    names = sorted(os.listdir(tmp_path / "backup"))
    assert names == [f"epoch-00000{i}.weights.h5" for i in (3, 4)]
    for epoch in (4, 3):
        other = make(mirrored(2))
        assert tf_regtopk.Backup(tmp_path / "backup").restore(other) == epoch
        assert resume_program.fingerprint(other) == saved[epoch - 1]
        os.remove(tmp_path / "backup" / names.pop())
    backup.delete()
    assert os.listdir(tmp_path) == []


def test_restore_comes_first(mirrored, tmp_path):
    model, backup = make(mirrored(2)), tf_regtopk.Backup(tmp_path)
    with pytest.raises(ValueError, match="must be called before `fit`"):
        model.fit(np.ones((8, 4)), np.ones((8, 1)), callbacks=[backup])


def test_goes_on_where_it_was(mirrored, tmp_path):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 2)
    backup = tf_regtopk.Backup(tmp_path)
    assert backup.restore(model) == 2
    with pytest.raises(ValueError, match="2. Received: initial_epoch=0"):
        model.fit(np.ones((8, 4)), np.ones((8, 1)), callbacks=[backup])


def test_what_not_all_workers_have_is_removed(mirrored, tmp_path, monkeypatch):
    """Else another attempt at that epoch might be mixed with it."""
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 3)
    # As if another worker had epoch 2 only.
    monkeypatch.setattr(
        backup_files.Folder,
        "positions_of_all",
        lambda *_: [backup_files.Position(2)],
    )
    assert tf_regtopk.Backup(tmp_path).restore(model) == 2
    assert resume_program.fingerprint(model) == saved[1]
    assert os.listdir(tmp_path) == ["epoch-000002.weights.h5"]


def test_workers_with_different_weights_are_refused(
    mirrored, tmp_path, monkeypatch
):
    model = make(mirrored(0))
    backup = tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 1)

    def gather(numbers, _):
        other = list(numbers)
        if len(numbers) == 2:
            other[1] += 1
        return np.array([numbers, other])

    monkeypatch.setattr(collectives, "gather_from_workers", gather)
    with pytest.raises(ValueError, match="must be of the same run"):
        tf_regtopk.Backup(tmp_path).restore(model)


def test_a_backup_in_which_workers_differ_is_passed_over(
    mirrored, tmp_path, monkeypatch
):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 2)
    errors = [ValueError("The workers differ")]

    def differ_once(_):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(backup_lib, "_check_workers_agree", differ_once)
    assert tf_regtopk.Backup(tmp_path).restore(model) == 1
    assert resume_program.fingerprint(model) == saved[0]
    assert sorted(os.listdir(tmp_path)) == [
        "damaged.epoch-000002.weights.h5",
        "epoch-000001.weights.h5",
    ]


def test_replicas_that_have_drifted_apart_are_not_backed_up(mirrored, tmp_path):
    strategy = mirrored(2)
    model, backup = make(strategy), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 1)
    _, second = strategy.experimental_local_results(
        model.trainable_variables[1].value
    )
    second.assign(2 * second + 1)
    with pytest.raises(RuntimeError, match="must have the same weights after"):
        backup.on_epoch_end(1)
    assert len(os.listdir(tmp_path)) == 1


def test_delete_needs_a_restore_and_cleans_up(mirrored, tmp_path):
    backup = tf_regtopk.Backup(tmp_path / "backup")
    with pytest.raises(ValueError, match="must be called first"):
        backup.delete()
    backup.restore(make(mirrored(0)))
    backup.delete()
    assert os.listdir(tmp_path) == []


def test_nothing_is_deleted_before_all_workers_are_done(
    mirrored, tmp_path, monkeypatch
):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 1)
    found = []
    monkeypatch.setattr(
        collectives,
        "gather_from_workers",
        lambda *_: found.append(sorted(os.listdir(tmp_path))),
    )
    backup.delete()
    saved = "epoch-000001.weights.h5"
    assert found == [[saved], [saved, "epochs.deleted"]]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    mirrored, tmp_path, monkeypatch
):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *args, name=name, original=original: (
                calls.append(name) or original(*args)
            ),
        )
    back_up(backup, model, 1)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_deletion_that_is_cut_short(mirrored, tmp_path, monkeypatch):
    """The next run starts anew, and does not go on from what is left."""
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = []

        def interrupt(path):
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
            os.unlink(path)

        patch.setattr(backup_files, "_remove", interrupt)
        backup.delete()
    assert len(os.listdir(tmp_path)) == 2  # A backup, and the mark.
    assert tf_regtopk.Backup(tmp_path).restore(model) == 0
    assert os.listdir(tmp_path) == []


FOREIGN = (
    "thesis.txt",
    "partial.notes",
    "damaged.goods",
    "epoch-2026.notes.txt",
    "epoch-2026.weights.h5",
    "epoch-000007.keras",
    "epoch-99999999999.weights.h5",
)
FOREIGN_FOLDERS = (
    "epoch-000099.weights.h5",
    "partial.epoch-000099.weights.h5",
    "epoch-000099.x",
    "partial.x",
)


def test_what_others_have_put_there_stays(mirrored, tmp_path):
    folder = tmp_path / "backup"
    for name in FOREIGN_FOLDERS:
        os.makedirs(folder / name)
        (folder / name / "kept").write_text("")
    for name in FOREIGN:
        (folder / name).write_text("")
    os.makedirs(tmp_path / "backup.deleted-thesis")
    foreign = sorted([*FOREIGN, *FOREIGN_FOLDERS])
    model, backup = make(mirrored(0)), tf_regtopk.Backup(folder)
    assert backup.restore(model) == 0
    back_up(backup, model, 2)
    (folder / "partial.epoch-000003.worker-1-of-2.weights.h5").write_text("")
    backup = tf_regtopk.Backup(folder)
    assert backup.restore(model) == 2
    assert set(os.listdir(folder)) - set(foreign) == {
        "epoch-000001.weights.h5",
        "epoch-000002.weights.h5",
    }
    backup.delete()
    assert sorted(os.listdir(folder)) == foreign
    assert sorted(os.listdir(tmp_path)) == ["backup", "backup.deleted-thesis"]


def test_a_folder_that_cannot_be_removed(mirrored, tmp_path, monkeypatch):
    """As a mount point, or in a parent that is not writable."""
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 1)

    def refuse(*_):
        raise OSError("Device or resource busy")

    for name in ("rmdir", "rename"):
        monkeypatch.setattr(os, name, refuse)
    backup.delete()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_link(mirrored, tmp_path):
    model, folder = make(mirrored(0)), tmp_path / "backup"
    os.symlink(tmp_path / "disk", folder)  # To what is not there yet.
    backup = tf_regtopk.Backup(folder)
    backup.restore(model)
    back_up(backup, model, 1)
    assert os.listdir(tmp_path / "disk") == ["epoch-000001.weights.h5"]
    backup.delete()
    assert os.path.islink(folder)
    assert os.listdir(tmp_path / "disk") == []


def test_the_intact_backup_before_a_damaged_one(mirrored, tmp_path, caplog):
    model, backup = make(mirrored(2)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 2)
    (tmp_path / "epoch-000002.weights.h5").write_bytes(b"no weights")
    other, backup = make(mirrored(2)), tf_regtopk.Backup(tmp_path)
    with caplog.at_level("WARNING", "tf_regtopk"):
        assert backup.restore(other) == 1
    assert resume_program.fingerprint(other) == saved[0]
    [line] = [r.message for r in caplog.records if "cannot be" in r.message]
    assert "after epoch 1, because the backup of epoch 2 cannot" in line
    assert "file signature not found" in line
    assert sorted(os.listdir(tmp_path)) == [
        "damaged.epoch-000002.weights.h5",
        "epoch-000001.weights.h5",
    ]
    backup.set_model(other)
    backup.on_epoch_end(1)
    backup.delete()
    assert not os.path.exists(tmp_path)


def test_a_backup_that_is_damaged_at_another_worker(
    mirrored, tmp_path, monkeypatch
):
    """All workers go on from the same epoch."""
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 2)
    attempts = []

    def gather(numbers, _):
        if len(numbers) > 1:
            return np.array([numbers, numbers])
        attempts.append(numbers)
        return np.array([numbers, [int(len(attempts) >= 2)]])

    monkeypatch.setattr(collectives, "gather_from_workers", gather)
    assert tf_regtopk.Backup(tmp_path).restore(model) == 1
    assert resume_program.fingerprint(model) == saved[0]
    monkeypatch.setattr(
        collectives,
        "gather_from_workers",
        lambda numbers, _: (
            np.array([numbers, [0] * len(numbers)])
            if len(numbers) == 1
            else np.array([numbers, numbers])
        ),
    )
    with pytest.raises(ValueError, match=r"others at the replicas \[1\]"):
        tf_regtopk.Backup(tmp_path).restore(model)


def test_a_write_that_is_cut_short(mirrored, tmp_path, monkeypatch):
    model, backup = make(mirrored(2)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 2)
    resume_program.change(model, 7)
    # The moment before the file would have got its name.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(os, "replace", interrupt)
        backup.on_epoch_end(2)
    [partial] = [name for name in os.listdir(tmp_path) if "partial" in name]
    with open(tmp_path / partial, "r+b") as file:
        file.truncate(1000)
    other = make(mirrored(2))
    assert tf_regtopk.Backup(tmp_path).restore(other) == 2
    assert resume_program.fingerprint(other) == saved[1]
    assert not any("partial" in name for name in os.listdir(tmp_path))


def test_a_disk_that_is_full(mirrored, tmp_path, monkeypatch):
    """What was there stays, no part of a file does, and the error says so."""
    model, backup = make(mirrored(2)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    saved = back_up(backup, model, 2)
    names = sorted(os.listdir(tmp_path))

    def fill_the_disk(_, path, *__):
        pathlib.Path(path).write_bytes(b"a part")
        raise OSError(28, "Can't close file")

    with monkeypatch.context() as patch:
        patch.setattr(backup_contents, "save", fill_the_disk)
        with pytest.raises(OSError, match="epoch 3 must fit .*after epoch 1, "):
            backup.on_epoch_end(2)
    assert sorted(os.listdir(tmp_path)) == names
    # HDF5 may end the process there, so that less room is an error before.
    size = max(os.path.getsize(tmp_path / name) for name in names)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=size - 1)
        )
        patch.setattr(backup_contents, "save", None)  # Not called.
        with pytest.raises(OSError, match=f"{size:,} bytes needed, ") as info:
            backup.on_epoch_end(2)
    assert info.value.errno == errno.ENOSPC
    other = make(mirrored(2))
    assert tf_regtopk.Backup(tmp_path).restore(other) == 2
    assert resume_program.fingerprint(other) == saved[1]


def test_a_folder_that_cannot_be_written(mirrored, tmp_path):
    """Known before an epoch is trained, and not after."""
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path / "a")
    backup.restore(model)
    os.rmdir(tmp_path / "a")
    with pytest.raises(OSError, match="`directory` of `Backup` must be"):
        model.fit(np.ones((8, 4)), np.ones((8, 1)), callbacks=[backup])
    assert model.optimizer.iterations == 0


def test_backups_of_a_run_with_other_arguments(mirrored, tmp_path):
    model = make(mirrored(2))
    backup = tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 2)
    other = make(mirrored(2), density=0.4)
    with pytest.raises(
        ValueError,
        match="(?s)give the arguments.*epoch 2 and after epoch 1: .*0.4.*0.2",
    ) as told:
        tf_regtopk.Backup(tmp_path).restore(other)
    assert str(told.value).count("must be of an optimizer with") == 1
    assert tf_regtopk.Backup(tmp_path).restore(make(mirrored(2))) == 2


def test_two_damaged_backups_are_both_named(mirrored, tmp_path):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="good files back;.*after epoch 3 and after epoch 2: "
    ):
        tf_regtopk.Backup(tmp_path).restore(model)
    assert len(os.listdir(tmp_path)) == 2


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
sys.path.append({str(paths.TESTS / "support")!r})
import logical_devices, test_backup, tf_regtopk
from tf_regtopk.callbacks import backup_contents

calls = 0
write = backup_contents.save_rest

def kill(*args):
    global calls
    calls += 1
    if calls == 3:  # The file is there, and not yet complete.
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)

backup_contents.save_rest = kill
model = test_backup.make(logical_devices.mirrored_strategy(0))
backup = tf_regtopk.Backup(sys.argv[1])
backup.restore(model)
test_backup.back_up(backup, model, 5)
"""


def test_kill_in_the_middle_of_a_write(mirrored, tmp_path):
    path = tmp_path / "killed.py"
    path.write_text(KILLED, encoding="utf-8")
    backup = tmp_path / "backup"
    process = fork_server.run_one(path, [backup], timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert any("partial" in name for name in os.listdir(backup))
    assert tf_regtopk.Backup(backup).restore(make(mirrored(0))) == 2


@pytest.mark.parametrize("what", ["moving_mean", "seed", "kernel"])
def test_one_bit(what, mirrored, tmp_path):
    model, backup = make(mirrored(0)), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    back_up(backup, model, 1)
    [value] = [v.numpy() for v in model.variables if what in v.path][:1]
    resume_program.change(model, 5)
    before = resume_program.fingerprint(model)
    path = tmp_path / "epoch-000001.weights.h5"
    data = bytearray(path.read_bytes())
    start = data.find(value.tobytes())
    assert start >= 0
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum|those that were saved"):
        tf_regtopk.Backup(tmp_path).restore(model)
    assert resume_program.fingerprint(model) == before


# ----- Several workers -----


def write(directory, positions, number, num_workers):
    """Positions are numbers of epochs, or of epochs and steps."""
    os.makedirs(directory, exist_ok=True)
    for position in positions:
        name = (
            f"epoch-{position:06d}"
            if isinstance(position, int)
            else ("epoch-{:06d}-step-{:06d}".format(*position))
        )
        world = f".worker-{number}-of-{num_workers}" if num_workers > 1 else ""
        (directory / f"{name}{world}.weights.h5").write_bytes(b"")


def newest(directories, monkeypatch):
    """The position that each worker, with a folder each, goes on with."""
    rows, results = [], []

    def gather(row, _):
        if len(rows) < len(directories):
            rows.append(row)
            raise InterruptedError
        return np.array(rows)

    monkeypatch.setattr(collectives, "gather_from_workers", gather)
    for _ in range(2):
        for number, directory in enumerate(directories):
            monkeypatch.setattr(
                strategy_lib,
                "worker_number",
                lambda _, n=number: (n, len(directories)),
            )
            try:
                folder = backup_files.Folder(directory)
                positions = folder.positions_of_all(None)
                results.append(max(positions, default=(0, 0)))
            except InterruptedError:
                pass
            except FileNotFoundError as e:
                assert "backups must be there of every worker" in str(e)
                results.append(FileNotFoundError)
    assert len(set(results)) == 1  # They all agree.
    return results[0]


def position(expected):
    """Of a number of epochs, if it is one."""
    return (expected, 0) if isinstance(expected, int) else expected


CASES = {
    # Epochs that workers 0, 1, ... have; the epoch to go on with.
    "nothing": ([[], []], 0),
    "the same": ([[3, 4], [3, 4]], 4),
    "one was slower": ([[3, 4], [2, 3]], 3),
    "one more, not yet cleaned": ([[3, 4, 5], [3, 4]], 4),
    "the first was cut short": ([[1], []], 0),
    "the second was cut short": ([[1, 2], [1]], 1),
    "one has lost its own": ([[3, 4], []], FileNotFoundError),
    "three": ([[3, 4], [3], [3, 4]], 3),
    "steps": ([[3, (3, 20)], [3, (3, 20)]], (3, 20)),
    "steps of one": ([[(3, 10), (3, 20)], [3, (3, 10)]], (3, 10)),
    "steps, then an epoch": ([[(3, 20), 4], [(3, 10), (3, 20)]], (3, 20)),
    "steps before an epoch": ([[(3, 20), 4], [(3, 20), 4]], 4),
    "the first steps were cut short": ([[(0, 10)], []], 0),
    "steps are lost": ([[(3, 10), (3, 20)], []], FileNotFoundError),
}


@pytest.mark.parametrize("shares_disk", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_workers_agree(case, shares_disk, tmp_path, monkeypatch):
    epochs_of, expected = CASES[case]
    directories = [
        tmp_path / ("all" if shares_disk else str(number))
        for number in range(len(epochs_of))
    ]
    for number, epochs in enumerate(epochs_of):
        write(directories[number], epochs, number, len(epochs_of))
    assert newest(directories, monkeypatch) == position(expected)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        # The first backup of the new world was cut short.
        ({0: [4, 5], 1: [4, 5], 2: [4, 5]}, {0: [6]}, 5),
        ({0: [4, 5], 1: [4, 5], 2: [4, 5]}, {0: [6], 1: [6]}, 6),
        ({0: [4, 5], 1: [4, 5], 2: [4]}, {}, 4),
        ({0: [4, 5], 1: [], 2: [4, 5]}, {}, FileNotFoundError),
    ],
)
def test_workers_agree_after_a_change(
    old, new, expected, tmp_path, monkeypatch
):
    for world, size in ((old, 3), (new, 2)):
        for number, epochs in world.items():
            write(tmp_path, epochs, number, size)
    assert newest([tmp_path] * 2, monkeypatch) == position(expected)


def test_gather_from_workers(mirrored):
    for num_replicas in (0, 2):
        rows = collectives.gather_from_workers([7, 8], mirrored(num_replicas))
        assert rows.tolist() == [[7, 8]] * max(1, num_replicas)


def test_a_run_with_loss_scaling(mirrored, tmp_path):
    def make_mixed():
        with mirrored(2).scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            model.compile(
                tf_regtopk.LossScaleOptimizer(
                    tf_regtopk.SparsifiedOptimizer(
                        keras.optimizers.SGD(0.1, momentum=0.9),
                        tf_regtopk.RegTopK(0.2),
                    )
                ),
                "mse",
            )
        return model

    def everything(model):
        optimizer = model.optimizer
        return [
            *(v.numpy() for v in [*model.variables, *optimizer.variables]),
            *optimizer.inner_optimizer.save_state().replicas[1],
        ]

    model, backup = make_mixed(), tf_regtopk.Backup(tmp_path)
    backup.restore(model)
    backup.set_model(model)
    model.fit(
        tf.fill([8, 4], np.inf),
        tf.ones([8, 1]),
        epochs=2,
        verbose=0,
        callbacks=[backup],
    )
    assert model.optimizer.dynamic_scale.numpy() == 2.0**13
    other = make_mixed()
    assert tf_regtopk.Backup(tmp_path).restore(other) == 2
    assert other.optimizer.dynamic_scale.numpy() == 2.0**13
    for a, b in zip(everything(other), everything(model), strict=True):
        np.testing.assert_array_equal(a, b)
