"""`Backup` in the middle of an epoch: by number of steps, and at SIGTERM."""

import os
import signal
import threading

import fork_server
import keras
import numpy as np
import paths
import pytest
import resume_program
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import backup_contents
from tf_regtopk.callbacks import backup_files
from tf_regtopk.callbacks import sigterm
from tf_regtopk.callbacks import skipped_steps
from tf_regtopk.distribute import collectives
from tf_regtopk.launch import notes

NUM_STEPS, BATCH_SIZE, EPOCHS = 7, 6, 3
ENDED = 128 + signal.SIGTERM


def arrays(num_steps=NUM_STEPS):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_steps * BATCH_SIZE, 4)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def dataset(batch_size=BATCH_SIZE):
    return tf.data.Dataset.from_tensor_slices(arrays()).batch(batch_size)


def of_unknown_length():
    return dataset().filter(lambda x, y: True)


def repeated():
    """Which gives other batches in each epoch: see `STEPS_PER_EPOCH`."""
    x, y = arrays(NUM_STEPS * EPOCHS)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)


DATA = {
    "arrays": lambda epoch: {
        **dict(zip("xy", arrays(), strict=True)),
        "batch_size": BATCH_SIZE,
    },
    "dataset": lambda epoch: {"x": dataset()},
    "of unknown length": lambda epoch: {"x": of_unknown_length()},
    "steps_per_epoch": lambda epoch: {
        "x": repeated().skip(epoch * NUM_STEPS),
        "steps_per_epoch": NUM_STEPS,
    },
}


class At(keras.callbacks.Callback):
    """Calls a function once, after a step of an epoch."""

    def __init__(self, epoch, step, function):
        super().__init__()
        self._at, self._function = (epoch, step), function
        self._calls = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._calls = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        self._calls += 1
        step = self._calls * self.model.steps_per_execution
        if (self._epoch, step) == self._at:
            self._function()


class Steps(keras.callbacks.Callback):
    """Records what is in a folder after each step, and counts the steps."""

    def __init__(self, folder):
        super().__init__()
        self._folder, self.found, self.taken = folder, [], 0

    def on_train_batch_begin(self, batch, logs=None):
        self._before = self.model.optimizer.iterations.numpy()
        found = positions(self._folder)
        if found[-1:] not in ([], self.found[-1:]):
            self.found.append(found[-1])
        assert len(found) <= 2

    def on_train_batch_end(self, batch, logs=None):
        self.taken += self.model.optimizer.iterations.numpy() - self._before


def positions(folder):
    """Those of the backups in a folder, and no other files."""
    found = sorted(backup_files.Folder(folder).files())
    assert len(found) == len(os.listdir(folder)), os.listdir(folder)
    return [tuple(position) for position, _ in found]


def ask_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


def fit(model, data, callbacks=(), initial_epoch=0, epochs=EPOCHS):
    """Returns the logs of all epochs."""
    return model.fit(
        **data(initial_epoch),
        initial_epoch=initial_epoch,
        epochs=epochs,
        callbacks=list(callbacks),
        shuffle=False,
        verbose=0,
    ).history


def stop(strategy, folder, epoch, step, data=DATA["dataset"], **for_compile):
    """Trains until SIGTERM, which comes after a step of an epoch."""
    model = resume_program.make_model(strategy, **for_compile)
    backup = tf_regtopk.Backup(folder)
    assert backup.restore(model) == 0
    with pytest.raises(SystemExit) as end:
        fit(model, data, [At(epoch, step, ask_to_end), backup])
    assert end.value.code == ENDED
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return model


def resume(strategy, folder, data=DATA["dataset"], extra=(), **for_compile):
    """Goes on to the end. Returns the model and the logs."""
    model = resume_program.make_model(strategy, **for_compile)
    backup = tf_regtopk.Backup(folder)
    first_epoch = backup.restore(model)
    logs = fit(model, data, [backup, *extra], first_epoch)
    return model, logs


CASES = [
    # Replicas, data, steps per execution, and the step of SIGTERM.
    (2, "dataset", 3, 3),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (0, "arrays", 1, 4),
            (0, "of unknown length", 3, 6),
            (2, "steps_per_epoch", 1, 1),
            (0, "dataset", 3, 6),
            (0, "steps_per_epoch", 1, 6),
            (2, "arrays", 1, 6),
            (2, "of unknown length", 1, 4),
            (3, "dataset", 1, 4),
        ]
    ),
]


@pytest.mark.parametrize("num_replicas, data, steps_per_execution, step", CASES)
def test_goes_on_to_the_bit(
    num_replicas, data, steps_per_execution, step, mirrored, tmp_path, caplog
):
    """Also the logs, of which the epoch that was cut counts as a whole."""
    strategy, data = mirrored(num_replicas), DATA[data]
    for_compile = {"steps_per_execution": steps_per_execution}
    whole = resume_program.make_model(strategy, **for_compile)
    expected = fit(whole, data)
    with caplog.at_level("INFO", "tf_regtopk"):
        stop(strategy, tmp_path, 1, step, data, **for_compile)
    [line] = [r.message for r in caplog.records if "SIGTERM" in r.message]
    assert f"after epoch 1 and {step} steps" in line
    assert positions(tmp_path) == [(1, 0), (1, step)]
    steps = Steps(tmp_path)
    model, logs = resume(strategy, tmp_path, data, extra=[steps], **for_compile)
    assert steps.taken == 2 * NUM_STEPS - step
    assert positions(tmp_path) == [(2, 0), (3, 0)]
    assert resume_program.fingerprint(model) == (
        resume_program.fingerprint(whole)
    )
    assert logs == {name: values[1:] for name, values in expected.items()}
    assert len(logs["mae"]) == 2


def test_every_steps(mirrored, tmp_path):
    model = resume_program.make_model(mirrored(0))
    backup, steps = tf_regtopk.Backup(tmp_path, 3), Steps(tmp_path)
    backup.restore(model)
    fit(model, DATA["dataset"], [backup, steps], epochs=2)
    assert steps.found == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6)]
    assert positions(tmp_path) == [(1, 6), (2, 0)]


def test_every_steps_of_some_at_once(mirrored, tmp_path):
    """After the first execution of 2 that has reached 3, 6, ... steps."""
    model = resume_program.make_model(mirrored(0), steps_per_execution=2)
    backup, steps = tf_regtopk.Backup(tmp_path, 3), Steps(tmp_path)
    backup.restore(model)
    fit(model, DATA["dataset"], [backup, steps], epochs=1)
    assert steps.found == [(0, 4), (0, 6)]


@pytest.mark.parametrize(
    "every_steps, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_every_steps_is_a_positive_integer(every_steps, error, tmp_path):
    with pytest.raises(error, match="`every_steps` must be an integer >= 1"):
        tf_regtopk.Backup(tmp_path, every_steps)


def test_the_backup_before_damaged_steps(mirrored, tmp_path, caplog):
    strategy = mirrored(0)
    whole = resume_program.make_model(strategy)
    fit(whole, DATA["dataset"])
    stop(strategy, tmp_path, 1, 4)
    path = backup_files.Folder(tmp_path).path(backup_files.Position(1, 4))
    with open(path, "r+b") as file:
        file.truncate(1000)
    with caplog.at_level("WARNING", "tf_regtopk"):
        model, _ = resume(strategy, tmp_path)
    assert "because the backup of epoch 1 and 4 steps cannot" in caplog.text
    assert "damaged.epoch-000001-step-000004.weights.h5" in os.listdir(tmp_path)
    assert resume_program.fingerprint(model) == (
        resume_program.fingerprint(whole)
    )


def test_one_bit_of_the_metrics(mirrored, tmp_path):
    model = stop(mirrored(0), tmp_path, 0, 4)
    path = backup_files.Folder(tmp_path).path(backup_files.Position(0, 4))
    [value] = [
        v.numpy().tobytes()
        for v in model.metrics_variables
        if "total" in v.path
    ][:1]
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[data.rfind(value)] ^= 1
        file.seek(0)
        file.write(data)
    with pytest.raises(ValueError, match="metrics with another checksum"):
        tf_regtopk.Backup(tmp_path).restore(model)


def test_another_number_of_steps(mirrored, tmp_path, caplog):
    """The same share is skipped, and older steps that seem newer go."""
    strategy = mirrored(0)
    stop(strategy, tmp_path, 1, 4)
    model = resume_program.make_model(strategy)
    backup, steps = tf_regtopk.Backup(tmp_path, 3), Steps(tmp_path)
    with caplog.at_level("INFO", "tf_regtopk"):
        first_epoch = backup.restore(model)
        fit(
            model,
            lambda epoch: {"x": dataset(2 * BATCH_SIZE)},
            [backup, steps],
            first_epoch,
            epochs=2,
        )
    # 4 of 7 steps are 2 of 4, and the next backup is after the third.
    assert "Skipping 2 of 4 steps, about the same share" in caplog.text
    assert steps.taken == 2
    assert steps.found == [(1, 4), (1, 3)]
    assert positions(tmp_path) == [(1, 3), (2, 0)]


def test_a_step_is_left_so_that_the_epoch_has_logs():
    epoch = backup_contents.EpochState(6, 7, 1, [])
    assert skipped_steps._num_executions(epoch, 3, 1) == 2


def test_another_number_of_replicas(mirrored, tmp_path, caplog):
    """Its metrics are of the rest of the epoch, and nothing else is lost."""
    stop(mirrored(2), tmp_path, 1, 4)
    with caplog.at_level("INFO", "tf_regtopk"):
        model, logs = resume(mirrored(0), tmp_path)
    assert "2 replicas had begun it, and 1 go on" in caplog.text
    assert model.optimizer.iterations.numpy() == EPOCHS * NUM_STEPS
    assert len(logs["loss"]) == 2


@pytest.mark.slow
def test_a_function_that_another_callback_makes_anew(mirrored, tmp_path):
    """As `DensityWarmup` does, wherever it is in the list."""
    stop(mirrored(0), tmp_path, 1, 4)
    steps = Steps(tmp_path)
    warmup = tf_regtopk.DensityWarmup([0.25] * 3)
    resume(mirrored(0), tmp_path, extra=[warmup, steps])
    assert steps.taken == 2 * NUM_STEPS - 4


def test_data_that_end_while_steps_are_skipped(mirrored, tmp_path):
    stop(mirrored(0), tmp_path, 1, 4, DATA["of unknown length"])
    short = of_unknown_length().take(2)
    with pytest.raises(ValueError, match="4 steps that .* about 2 batches"):
        resume(mirrored(0), tmp_path, lambda epoch: {"x": short})


def test_metrics_that_the_model_does_not_have(mirrored, tmp_path, caplog):
    stop(mirrored(0), tmp_path, 1, 4)
    model = resume_program.make_model(mirrored(0))
    model.compile(model.optimizer, "mse", metrics=["mae", "mse"])
    backup = tf_regtopk.Backup(tmp_path)
    with caplog.at_level("INFO", "tf_regtopk"):
        logs = fit(model, DATA["dataset"], [backup], backup.restore(model))
    assert "the model had other metrics" in caplog.text
    assert set(logs) == {"loss", "mae", "mse"}


# ----- SIGTERM -----


def test_sigterm_in_an_epochs_last_step(mirrored, tmp_path, monkeypatch):
    monkeypatch.setenv(notes.VARIABLE, str(tmp_path))
    stop(mirrored(0), tmp_path / "backup", 0, NUM_STEPS)
    assert positions(tmp_path / "backup") == [(1, 0)]
    assert notes.read(tmp_path, "backed_up") == ["epoch 1, step 0"]


def test_a_note_for_the_launcher(mirrored, tmp_path, monkeypatch):
    monkeypatch.setenv(notes.VARIABLE, str(tmp_path))
    stop(mirrored(0), tmp_path / "backup", 0, 2)
    assert notes.read(tmp_path, "backed_up") == ["epoch 0, step 2"]


def test_whether_the_launcher_may_ask(mirrored, tmp_path, monkeypatch):
    """While `fit` runs, and neither before nor after."""
    monkeypatch.setenv(notes.VARIABLE, str(tmp_path))
    found = []

    def may_ask():
        found.append(notes.read(tmp_path, "can_back_up"))

    model, backup = (
        resume_program.make_model(mirrored(0)),
        tf_regtopk.Backup(tmp_path / "backup"),
    )
    backup.restore(model)
    may_ask()
    fit(model, DATA["dataset"], [backup, At(0, 2, may_ask)], epochs=1)
    may_ask()
    assert found == [[], ["while fit runs"], []]


def test_a_handler_of_the_users_stays(mirrored, tmp_path):
    calls = []

    def handler(*args):
        calls.append(args)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        model, backup = (
            resume_program.make_model(mirrored(0)),
            tf_regtopk.Backup(tmp_path),
        )
        backup.restore(model)
        fit(model, DATA["dataset"], [backup, At(0, 2, ask_to_end)], epochs=1)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 1
    assert positions(tmp_path) == [(1, 0)]


def test_the_handler_is_put_back(mirrored, tmp_path):
    model, backup = (
        resume_program.make_model(mirrored(0)),
        tf_regtopk.Backup(tmp_path),
    )
    backup.restore(model)
    handlers = []
    at = At(0, 1, lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    fit(model, DATA["dataset"], [backup, at], epochs=1)
    assert [type(h.__self__) for h in handlers] == [sigterm.Request]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_fit_in_a_thread(mirrored, tmp_path):
    """Python allows no handlers there."""
    model, backup = (
        resume_program.make_model(mirrored(0)),
        tf_regtopk.Backup(tmp_path),
    )
    backup.restore(model)
    thread = threading.Thread(
        target=fit,
        args=(model, DATA["dataset"], [backup]),
        kwargs={"epochs": 1},
    )
    thread.start()
    thread.join()
    assert positions(tmp_path) == [(1, 0)]


def test_a_worker_that_was_not_asked_ends_as_well(
    mirrored, tmp_path, monkeypatch
):
    """When all have saved, and with the handler put back."""
    gather, found = collectives.gather_from_workers, []

    def record(*args):
        found.append(positions(tmp_path))
        return gather(*args)

    model, backup = (
        resume_program.make_model(mirrored(0)),
        tf_regtopk.Backup(tmp_path),
    )
    backup.restore(model)
    monkeypatch.setattr(collectives, "gather_from_workers", record)
    monkeypatch.setattr(sigterm.Checks, "after_steps", lambda *_: True)
    with pytest.raises(SystemExit):
        fit(model, DATA["dataset"], [backup])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert found == [[], [(0, 1)]]


def fail():
    raise RuntimeError("Lost")


def end_a_fork():
    """A process that was forked in `fit` ends at SIGTERM, as any other."""
    pid = os.fork()
    if not pid:
        ask_to_end()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def ask_twice():
    ask_to_end()
    ask_to_end()


def ask_twice_with_launcher():
    """Slurm asks both the launcher, which passes it on, and the worker."""
    os.environ[notes.VARIABLE] = "a folder that is not there"
    ask_twice()


class AtTheEnd(keras.callbacks.Callback):
    def on_train_end(self, logs=None):
        ask_to_end()


SCENARIOS = {
    # Callbacks; whether `fit` returns, and the exit status.
    "twice": ([At(0, 2, ask_twice)], False, -signal.SIGTERM),
    "twice, with a launcher": (
        [At(0, 2, ask_twice_with_launcher)],
        False,
        ENDED,
    ),
    "after an error": ([At(0, 2, fail)], True, -signal.SIGTERM),
    "a fork": ([At(0, 2, end_a_fork)], True, -signal.SIGTERM),
    "after the last backup": ([AtTheEnd()], False, -signal.SIGTERM),
    "once": ([At(0, 2, ask_to_end)], False, ENDED),
}
PROGRAM = f"""
import sys
sys.path.append({str(paths.TESTS / "support")!r})
sys.path.insert(0, {os.path.dirname(__file__)!r})
import logical_devices, resume_program, tf_regtopk
import test_backup_steps as steps

callbacks, _, _ = steps.SCENARIOS[sys.argv[2]]
model = resume_program.make_model(logical_devices.mirrored_strategy(0))
backup = tf_regtopk.Backup(sys.argv[1])
backup.restore(model)
try:
    steps.fit(model, steps.DATA["dataset"], [*callbacks, backup], epochs=1)
except RuntimeError:
    pass
print("fit has returned")
steps.ask_to_end()
"""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_how_a_process_ends(scenario, tmp_path):
    _, returns, status = SCENARIOS[scenario]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    process = fork_server.run_one(
        program, [tmp_path / "backup", scenario], timeout=120
    )
    assert process.returncode == status, process
    assert ("fit has returned" in process.stdout) == returns
