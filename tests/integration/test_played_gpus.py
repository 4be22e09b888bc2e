"""What would fail or be slow on GPUs, on CPUs that play them."""

import contextlib
import os

import keras
import numpy as np
import played_gpus
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.kernels import words

SHAPES = [(7, 11), (30,), ()]
SIZE = 7 * 11 + 30 + 1
CASES = {
    "regtopk": {},
    "regtopk, current": {
        "sparsifier": tf_regtopk.RegTopK(0.1, denominator="current")
    },
    "topk": {"sparsifier": tf_regtopk.TopK(0.1)},
    "randomk": {"sparsifier": tf_regtopk.RandomK(0.1)},
    "dense": {"sparsifier": tf_regtopk.Dense()},
    **{
        f"indices {name}": {"codec": tf_regtopk.Codec(name)}
        for name in ("int32", "elias_fano", "golomb", "bitmap")
    },
    **{
        f"values {name}": {"codec": tf_regtopk.Codec(values=name)}
        for name in (
            "bfloat16",
            "float16",
            "natural",
            "uniform",
            "sign",
            "ternary",
        )
    },
    **{
        f"rule {type(rule).__name__}": {"error_feedback": rule}
        for rule in (
            tf_regtopk.Accumulate(momentum=0.9, factor_masking=True),
            tf_regtopk.NoFeedback(),
            tf_regtopk.EF21(momentum=0.1),
            tf_regtopk.LearnedShift(momentum=0.9),
            tf_regtopk.LocalAdam(tf_regtopk.LearnedShift()),
            tf_regtopk.CompressedDownlink(),
        )
    },
    "per variable": {"scope": "per_variable"},
    "dense below": {"dense_below": 20},
    "dense exchange": {
        "exchange": "dense",
        "error_feedback": tf_regtopk.Accumulate(momentum=0.9),
    },
    "auto": {"exchange": "auto"},
    "hierarchical": {"hierarchical": True},
}


@pytest.fixture(scope="module")
def gpus():
    """The strategy of two played GPUs."""
    return played_gpus.mirrored_strategy()


@contextlib.contextmanager
def no_strategy():
    with tf.device(played_gpus.DEVICES[0]):
        yield


def make_step(strategy, kwargs):
    """A traced step of random gradients, its variables and the optimizer."""
    kwargs = {"sparsifier": tf_regtopk.RegTopK(0.1), **kwargs}
    with played_gpus.host_keeps_its_variables(), strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float32") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), **kwargs
        )
        optimizer.build(variables)

    @tf.function(autograph=False)
    def step():
        def replica_step():
            optimizer.apply([tf.ones(v.shape) for v in variables], variables)

        strategy.run(replica_step)

    return step.get_concrete_function(), variables, optimizer


def state_variables(optimizer):
    exchange = optimizer._partition
    return [
        part
        for state in (exchange.feedback_state, exchange.memory)
        for parts, _ in state._parts()
        for part in parts
    ]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow)
        if case.startswith(("values ", "indices "))
        and case not in ("values ternary", "indices golomb")
        else case
        for case in CASES
    ],
)
def test_no_state_or_border_is_of_the_host(case, gpus):
    """Of every sparsifier, codec, rule and way to exchange."""
    step, _, optimizer = make_step(gpus, CASES[case])
    for variable in state_variables(optimizer):
        assert variable.dtype not in played_gpus.HOST_DTYPES
        assert variable.device[-5:] in played_gpus.DEVICES
    # Without error feedback a dense exchange compiles nothing.
    if optimizer.chosen_exchange == "sparse":
        assert played_gpus.compiled_calls(step.graph)
    assert not played_gpus.crossings(step.graph)


def numbers_not_held(monkeypatch):
    monkeypatch.setattr(words, "hold", lambda value: value)
    monkeypatch.setattr(words, "hold_array", lambda array, dtype: array)
    monkeypatch.setattr(words, "release", lambda held, dtype: held)
    monkeypatch.setattr(words, "release_array", lambda held, dtype: held)


def test_a_tensor_of_the_host_at_a_border_is_found(gpus, monkeypatch):
    numbers_not_held(monkeypatch)
    # Of Top-k there is no variable of the host.
    step, _, _ = make_step(gpus, {"sparsifier": tf_regtopk.TopK(0.1)})
    found = played_gpus.crossings(step.graph)
    # On two replicas: payload and indices out, payloads in, and all indices out
    # and in.
    assert len(found) == 2 * 6, found


def test_a_variable_of_the_host_is_refused(gpus, monkeypatch):
    numbers_not_held(monkeypatch)
    step, _, _ = make_step(gpus, {})
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Trying to access resource"
    ):
        step()


def fit(kwargs, model=None, epochs=2):
    x = np.random.default_rng(0).standard_normal((24, 9)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    if model is None:
        model = keras.Sequential(
            [keras.Input((9,)), keras.layers.Dense(7), keras.layers.Dense(1)]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.01),
                **{"sparsifier": tf_regtopk.RegTopK(0.1), **kwargs},
            ),
            loss="mse",
            jit_compile=False,
        )
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize(
    "where, case",
    [
        pytest.param("none", "regtopk", marks=pytest.mark.slow),
        pytest.param("one", "regtopk, current", marks=pytest.mark.slow),
        ("mirrored", "regtopk"),
        pytest.param("mirrored", "indices golomb", marks=pytest.mark.slow),
        pytest.param("mirrored", "hierarchical", marks=pytest.mark.slow),
    ],
)
def test_training_is_saved_and_goes_on(where, case, gpus, tmp_path):
    """As on the host, and to the bit."""
    scope = {
        "none": no_strategy,
        "one": tf.distribute.OneDeviceStrategy(played_gpus.DEVICES[0]).scope,
        "mirrored": gpus.scope,
    }[where]
    kwargs = CASES[case]
    with played_gpus.host_keeps_its_variables(), scope():
        keras.utils.set_random_seed(0)
        model = fit(kwargs)
        path = os.path.join(tmp_path, "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        models = [fit(kwargs, m, epochs=1) for m in (model, loaded)]
    for expected, actual in zip(
        *(m.get_weights() for m in models), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    assert model.optimizer.iterations.numpy() == 9


def test_another_density(gpus):
    with played_gpus.host_keeps_its_variables(), gpus.scope():
        model = fit({}, epochs=1)
        model.optimizer.set_density(0.5)
        model.make_train_function(force=True)
        fit({}, model, epochs=1)
    assert model.optimizer.iterations.numpy() == 6
