"""Numbers of the wrapper in the logs of `fit` and in TensorBoard's files."""

import csv
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import monitor

BATCHES, EPOCHS = 3, 2
ALWAYS = {"density", "bytes", "compression", "skipped"}
MEASURED = {"residual", "unlike_top_k", "cancelled", "exchange_seconds"}
OF_REG_TOP_K = {"damped", "selected_again"}


def make_model(strategy, sparsifier=None, around=None, **arguments):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(7, "tanh", name="first"),
                keras.layers.Dense(1, name="last"),
            ]
        )
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), sparsifier, **arguments
        )
        model.compile(around(optimizer) if around else optimizer, loss="mse")
    return model


def fit(model, callbacks, bad_batch=None, epochs=EPOCHS, **arguments):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4 * BATCHES, 5)).astype("float32")
    y = rng.standard_normal((4 * BATCHES, 1)).astype("float32")
    if bad_batch is not None:
        x[4 * bad_batch] = np.nan
    return model.fit(
        x,
        y,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        **{"verbose": 0, **arguments},
    ).history


def keys(history):
    return {
        name.removeprefix("sparse_")
        for name in history
        if name.startswith("sparse_")
    }


class Recorder(keras.callbacks.Callback):
    """What the optimizer says after each epoch, and after each batch."""

    def __init__(self):
        super().__init__()
        self.epochs, self.batches = [], []

    def found(self):
        optimizer = self.model.optimizer
        return optimizer.telemetry(), optimizer.wire_report()

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(self.found())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self.found())


@pytest.fixture(scope="module")
def watched(mirrored, tmp_path_factory):
    """A training of two replicas with all that a `Monitor` can do."""
    folder = tmp_path_factory.mktemp("monitor")
    model = make_model(
        mirrored(2), tf_regtopk.RegTopK(0.1, mu=2.0), telemetry="ages"
    )
    recorder, lines = Recorder(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("tf_regtopk")
    logger.addHandler(handler)
    try:
        history = fit(
            model,
            [
                tf_regtopk.DensityWarmup((0.5,)),
                tf_regtopk.Monitor(folder / "logs", every=2, per_variable=True),
                keras.callbacks.CSVLogger(folder / "log.csv"),
                recorder,
            ],
            verbose=2,
        )
    finally:
        logger.removeHandler(handler)
    return model, history, recorder, folder, lines


def test_history_has_the_numbers_of_the_optimizer(watched):
    _, history, recorder, _, _ = watched
    assert keys(history) == ALWAYS | MEASURED | OF_REG_TOP_K | {"oldest"}
    assert history["sparse_density"] == [0.5, 0.1]  # Of the warm-up.
    assert history["sparse_skipped"] == [0, 0]
    for epoch, (of_replicas, report) in enumerate(recorder.epochs):
        actual = {
            name.removeprefix("sparse_"): values[epoch]
            for name, values in history.items()
        }
        assert actual["bytes"] == report.sent_bytes
        assert actual["compression"] == (
            report.dense_sent_bytes / report.sent_bytes
        )

        def norm(name, found=of_replicas):
            return np.sqrt(np.mean([of_one[name] ** 2 for of_one in found]))

        def share(name, found=of_replicas):
            k = report.num_selected
            return np.mean([of_one[name] / k for of_one in found])

        np.testing.assert_allclose(
            actual["residual"], norm("residual") / norm("gradient"), rtol=1e-6
        )
        assert actual["residual"] > 0
        for name in ("unlike_top_k", *OF_REG_TOP_K):
            np.testing.assert_allclose(actual[name], share(name), rtol=1e-6)
        assert actual["cancelled"] == of_replicas[0]["cancelled"]
        assert actual["oldest"] == max(n["oldest"] for n in of_replicas)
    assert history["sparse_selected_again"][0] > 0
    assert history["sparse_oldest"][1] > 0


def test_callbacks_that_come_after_get_the_numbers(watched):
    _, history, _, folder, _ = watched
    rows = list(csv.DictReader((folder / "log.csv").open(encoding="utf-8")))
    for name in ("sparse_density", "sparse_residual"):
        assert [float(row[name]) for row in rows] == history[name]


def summaries(folder):
    """`(plugin, steps, tensors)` of each tag of the one file in a folder."""
    [path] = folder.iterdir()
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            _, steps, tensors = found.setdefault(value.tag, (plugin, [], []))
            steps.append(event.step)
            tensors.append(tf.make_ndarray(value.tensor))
    return found


def test_files_of_tensorboard(watched):
    model, history, recorder, folder, _ = watched
    found = summaries(folder / "logs")
    for name, values in history.items():
        if not name.startswith("sparse_"):
            continue
        name = name.removeprefix("sparse_")
        plugin, steps, tensors = found[f"sparse_epoch/{name}"]
        assert (plugin, steps) == ("scalars", [0, 1])
        np.testing.assert_allclose(tensors, values, rtol=1e-6)
    # Every second of the three batches of an epoch.
    plugin, steps, tensors = found["sparse_batch/cancelled"]
    assert (plugin, steps) == ("scalars", [2, 5])
    at_batches = [recorder.batches[i][0] for i in (1, 4)]
    np.testing.assert_allclose(
        tensors, [of[0]["cancelled"] for of in at_batches], rtol=1e-6
    )
    paths = [variable.path for variable in model.trainable_variables]
    assert model.optimizer.sparse_variables == paths
    for i, path in enumerate(paths):
        plugin, steps, shares = found[f"sparse_epoch_share_of_k/{path}"]
        assert (plugin, steps) == ("scalars", [0, 1])
        expected = [
            np.mean(
                [
                    of_one["selected_by_variable"][i] / of_one["selected"]
                    for of_one in of_replicas
                ]
            )
            for of_replicas, _ in recorder.epochs
        ]
        np.testing.assert_allclose(shares, expected, rtol=1e-6)
        _, steps, norms = found[f"sparse_batch_residual/{path}"]
        assert steps == [2, 5]
        squares = [
            np.mean([o["residual_by_variable"][i] ** 2 for o in of_replicas])
            for of_replicas in at_batches
        ]
        np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)
    plugin, steps, images = found["sparse_epoch_share_of_k"]
    assert (plugin, steps) == ("images", [0, 1])
    pixels = tf.io.decode_png(images[-1][2]).numpy()
    # A row for each variable; two batches and two epochs.
    assert pixels.shape == (8 * len(paths), 8 * 4, 1)
    assert pixels.max() == 255


def test_a_table_after_training(watched):
    _, history, _, _, lines = watched
    _, head, *rows = lines[-1].splitlines()
    assert head.split() == ["epoch", "1", "epoch", "2"]
    assert len(rows) <= 10
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert table["density"] == ["0.5", "0.1"]
    assert table["bytes"] == [f"{b:,}" for b in history["sparse_bytes"]]


def test_skipped_steps_without_telemetry(mirrored, capfd):
    """Under a loss scale, for which NaN is nothing unusual."""
    model = make_model(
        mirrored(0), tf_regtopk.TopK(0.5), tf_regtopk.LossScaleOptimizer
    )
    watching = tf_regtopk.Monitor()
    history = fit(model, [watching], bad_batch=1)
    assert keys(history) == ALWAYS
    assert history["sparse_skipped"] == [1, 1]
    assert model.optimizer.inner_optimizer.skipped_steps == 2
    assert history["sparse_bytes"] == [0, 0]  # A single replica.
    assert history["sparse_compression"] == [1.0, 1.0]
    fit(model, [watching], epochs=1)
    told = capfd.readouterr().err
    assert told.count("`Monitor` shows") == 1
    assert "it also shows: residual, unlike_top_k, cancelled, exchange" in told
    assert "last epoch" not in told  # No table with `verbose=0`.
    with pytest.raises(ValueError, match="created with `telemetry=True`"):
        fit(model, [tf_regtopk.Monitor("nowhere", per_variable=True)])


def test_all_variables_exchanged_densely(mirrored):
    model = make_model(mirrored(2), tf_regtopk.TopK(0.25), dense=["*"])
    history = fit(model, [tf_regtopk.Monitor()], epochs=1)
    assert history["sparse_density"] == history["sparse_compression"] == [1.0]


def test_a_dense_exchange_has_no_telemetry(mirrored, tmp_path):
    model = make_model(mirrored(2), exchange="dense", telemetry=True)
    watching = tf_regtopk.Monitor(tmp_path, per_variable=True)
    history = fit(model, [watching], epochs=1)
    assert keys(history) == ALWAYS
    assert history["sparse_density"] == history["sparse_compression"] == [1.0]
    assert {tag for tag in summaries(tmp_path)} == {
        f"sparse_epoch/{name.removeprefix('sparse_')}" for name in ALWAYS
    }


def test_only_the_chief_writes(mirrored, tmp_path, monkeypatch):
    model = make_model(mirrored(0), tf_regtopk.TopK(0.5))
    monkeypatch.setattr(
        monitor.collectives,
        "gather_from_workers",
        lambda row, _: np.array([row, row]),
    )
    for worker in (1, 0):
        monkeypatch.setattr(
            monitor.strategy_lib, "worker_number", lambda _, n=worker: (n, 2)
        )
        fit(model, [tf_regtopk.Monitor(tmp_path)], epochs=1)
        assert len(list(tmp_path.iterdir())) == 1 - worker


def test_nothing_is_read_between(mirrored, monkeypatch):
    """Without `every` only once an epoch."""
    model = make_model(mirrored(0), tf_regtopk.TopK(0.5), telemetry=True)
    num_reads = []
    original = tf_regtopk.SparsifiedOptimizer.telemetry
    monkeypatch.setattr(
        tf_regtopk.SparsifiedOptimizer,
        "telemetry",
        lambda self: num_reads.append(0) or original(self),
    )
    fit(model, [tf_regtopk.Monitor()])
    assert len(num_reads) == EPOCHS


def test_numbers_of_workers_combine_as_those_of_replicas():
    rng = np.random.default_rng(0)
    names = ("gradient", "residual", "selected", "cancelled", "oldest")
    of_replicas = [
        dict(zip(names, rng.random(5), strict=True)) for _ in range(6)
    ]
    of_workers = [
        monitor._combine(of_replicas[i : i + 3]) for i in range(0, 6, 3)
    ]
    assert monitor._combine(of_workers) == pytest.approx(
        monitor._combine(of_replicas)
    )
    assert monitor._combine([]) == {}


def test_bad_arguments(mirrored):
    with pytest.raises(ValueError, match="`log_dir` must be a folder .*=True"):
        tf_regtopk.Monitor(per_variable=True)
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        tf_regtopk.Monitor("logs", every=0)
    with pytest.raises(TypeError, match="`summary` must be a boolean"):
        tf_regtopk.Monitor(summary=1)
    model = make_model(mirrored(0))
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match=r"wrap it before, as by .*wrap\("):
        fit(model, [tf_regtopk.Monitor()])
