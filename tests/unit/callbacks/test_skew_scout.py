"""A communication period that follows what differing data costs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import skew_scout
from tf_regtopk.callbacks import travelling

PERIODS = (1, 2, 4, 8, 16, 32)
RING = tf_regtopk.Ring()


def scout(**kwargs):
    x = np.zeros((8, 2), np.float32)
    y = np.arange(8) % 2
    return tf_regtopk.SkewScout(
        x, y, **{"periods": PERIODS, "batch_size": 4, **kwargs}
    )


def synthetic_loss(period, scale):
    """An accuracy lost that grows with the period."""
    return scale * np.sqrt(period)


@pytest.mark.parametrize("first", PERIODS)
@pytest.mark.parametrize("scale", [0.001, 0.02, 0.03, 0.2])
def test_settles_at_the_best_period(first, scale):
    found = scout()
    costs = [found.cost(p, synthetic_loss(p, scale)) for p in PERIODS]
    climb = skew_scout.HillClimb(PERIODS)
    visited = [first]
    for _ in range(20):
        p = visited[-1]
        visited.append(climb.next(p, costs[PERIODS.index(p)]))
    assert {*visited[10:]} == {PERIODS[np.argmin(costs)]}


def test_the_best_periods_of_that_test_differ():
    found = scout()
    best = {
        min(PERIODS, key=lambda p: found.cost(p, synthetic_loss(p, scale)))
        for scale in (0.001, 0.02, 0.03, 0.2)
    }
    assert len(best) == 4


def test_follows_a_loss_that_grows():
    """As when training goes on and the replicas go apart."""
    found, period = scout(), 1
    climb = skew_scout.HillClimb(PERIODS)
    for _ in range(20):
        cost = found.cost(period, synthetic_loss(period, 0.001))
        period = climb.next(period, cost)
    assert period == 32
    for _ in range(20):
        cost = found.cost(period, synthetic_loss(period, 0.02))
        period = climb.next(period, cost)
    assert period == 4


def build(strategy, period=1, metrics=("accuracy",), learning_rate=0.1, **kw):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input([2]),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(2, activation="softmax"),
            ]
        )
        model.compile(
            tf_regtopk.DecentralizedOptimizer(
                keras.optimizers.SGD(learning_rate),
                RING,
                communication_period=period,
                average_at_end=False,
                **kw,
            ),
            "sparse_categorical_crossentropy",
            metrics=[*metrics],
        )
    return model


def one_label_each(n, size=12):
    """Batches of which each of n replicas gets the images of one label."""
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(n) % 2, size)
    y = y.reshape(size, n)
    x = rng.standard_normal((size, n, 2)) + 2 * y[..., np.newaxis]
    return x.reshape(-1, 2).astype(np.float32), y.reshape(-1)


def fit(model, callback, n=2, epochs=4, **kwargs):
    x, y = one_label_each(n)
    return model.fit(
        x,
        y,
        batch_size=n,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        **kwargs,
    ).history


def test_travelling(mirrored):
    strategy = mirrored(3)
    with strategy.scope():
        variable = keras.Variable(np.zeros((2, 2)), dtype="float32")
        other = keras.Variable(0.0, dtype="bfloat16")
    parts = strategy.experimental_local_results(variable.value)
    for rank, part in enumerate(parts):
        part.assign(tf.fill([2, 2], 10.0 + rank))
    travel = travelling.Travel([variable, other], strategy)
    for _ in range(2):
        with travel.away():
            assert [int(part[0, 0]) for part in parts] == [12, 10, 11]
        assert [int(part[0, 0]) for part in parts] == [10, 11, 12]


def test_models_that_travel_lose_accuracy(mirrored):
    """On labels that they have not seen: the replicas have one label each."""
    model = build(mirrored(2), period=8)
    x, y = one_label_each(2)
    callback = tf_regtopk.SkewScout(x, y, periods=[1, 8], batch_size=2)
    before = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            before[:] = self.model.get_weights()

    x, y = one_label_each(2)
    history = model.fit(
        x,
        y,
        batch_size=2,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[Note(), callback],
    ).history
    assert history["accuracy_loss"][0] > 0.2
    # It is worth an exchange in each step, which takes effect.
    assert history["communication_period"] == [1, 1, 1]
    assert model.optimizer.communication_period == 1
    # All have their own weights again.
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_replicas_that_are_equal_change_nothing(mirrored):
    """They were never apart, or a mean of all has just come."""
    model = build(mirrored(2), period=2, learning_rate=0.0)
    x, y = one_label_each(2)
    callback = tf_regtopk.SkewScout(x, y, periods=[1, 2, 4], batch_size=2)
    history = fit(model, callback)
    assert history["communication_period"] == [2] * 4
    assert "accuracy_loss" not in history


def test_epochs_without_a_measurement(mirrored, monkeypatch):
    monkeypatch.setattr(tf_regtopk.SkewScout, "accuracy_loss", lambda self: 0.0)
    history = fit(build(mirrored(2)), scout(every=2), epochs=5)
    assert history["communication_period"] == [1, 2, 2, 4, 4]
    assert history["accuracy_loss"] == [0.0, 0.0]


@pytest.mark.parametrize(
    "n, period, kwargs, message",
    [
        (0, 1, dict(), "must have several replicas"),
        (2, 3, dict(), "must hold the `communication_period`.*, 3"),
        (2, 1, dict(metric="mae"), r"\['accuracy', 'loss'\]"),
    ],
)
def test_refusals(n, period, kwargs, message, mirrored):
    with pytest.raises(ValueError, match=message):
        fit(build(mirrored(n), period), scout(**kwargs), n=2)


def test_another_optimizer_is_refused():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="with a `DecentralizedOptimizer`"):
        model.fit(np.ones((4, 2)), np.ones(4), callbacks=[scout()], verbose=0)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(periods=4), TypeError, "at least two rising integers"),
        (dict(periods=[4]), ValueError, "at least two rising integers"),
        (dict(periods=[4, 2]), ValueError, "at least two rising integers"),
        (dict(periods=[0, 2]), ValueError, "`periods` must be an integer >= 1"),
        (dict(metric="loss"), ValueError, "larger for better models"),
        (dict(tolerance=1), ValueError, "in \\[0, 1\\)"),
        (dict(loss_weight=0), ValueError, "`loss_weight` must be positive"),
        (dict(every=0), ValueError, "`every` must be an integer"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        scout(**kwargs)
