"""Numbers about a step, against NumPy."""

import time

import flat_gradients
import keras
import numpy as np
import pytest

import tf_regtopk

SHAPES = [(4, 5), (6,), (3,)]
SIZES = [20, 6, 3]
SIZE = 29


def start(strategy, sparsifier, **kwargs):
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float32") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            sparsifier,
            **{"telemetry": True, **kwargs},
        )
    step = flat_gradients.step_function(strategy, optimizer, variables)
    return optimizer, step


def norms(vector):
    parts = np.split(vector, np.cumsum(SIZES)[:-1])
    return [np.linalg.norm(part) for part in parts]


def test_numbers_of_steps(mirrored):
    """Of three steps of RegTop-k on two replicas."""
    optimizer, step = start(mirrored(2), tf_regtopk.RegTopK(0.2))
    rng = np.random.default_rng(0)
    errors = np.zeros((2, SIZE))
    before = None
    for _ in range(3):
        g = rng.standard_normal((2, SIZE)).astype(np.float32)
        # The replicas cancel each other here.
        g[1, :5] = -g[0, :5]
        begin = time.perf_counter()
        step(g)
        found = optimizer.telemetry()
        elapsed = time.perf_counter() - begin
        after = np.array(
            [
                np.concatenate([part.ravel() for part in of_replica])
                for of_replica in optimizer.residual_errors()
            ]
        )
        a = errors + g
        sent = np.where(after == 0, a, 0)
        chosen = [set(np.flatnonzero(s)) for s in sent]
        total = sent.sum(axis=0)
        cancelled = 1 - np.abs(total).sum() / np.abs(sent).sum()
        for n, measured in enumerate(found):
            for name, vector in (
                ("gradient", g[n]),
                ("accumulated", a[n]),
                ("sent", sent[n]),
                ("residual", after[n]),
            ):
                np.testing.assert_allclose(
                    measured[name], np.linalg.norm(vector), rtol=1e-4
                )
                np.testing.assert_allclose(
                    measured[f"{name}_by_variable"],
                    norms(vector),
                    rtol=1e-4,
                    atol=2e-3,
                )
            assert 0 < measured["exchange_seconds"] < elapsed
            assert measured["selected"] == 6 == len(chosen[n])
            assert measured["selected_by_variable"].sum() == 6
            top_k = set(np.argsort(-np.abs(a[n]))[:6])
            assert measured["unlike_top_k"] == len(chosen[n] - top_k)
            np.testing.assert_allclose(
                measured["cancelled"], cancelled, rtol=1e-4, atol=1e-6
            )
            if before is None:
                assert measured["damped"] == measured["selected_again"] == 0
            else:
                old_chosen, old_sent, old_total = before
                ratios = np.array(
                    [old_total[j] / old_sent[n][j] for j in old_chosen[n]]
                )
                assert measured["damped"] == (np.abs(ratios) < 0.5).sum()
                assert measured["selected_again"] == len(
                    old_chosen[n] & chosen[n]
                )
        before = chosen, sent, total
        errors = after
    assert found[0]["unlike_top_k"] > 0
    assert found[0]["damped"] > 0


def test_nobody_waits_without_others(mirrored):
    optimizer, step = start(mirrored(0), tf_regtopk.TopK(0.2))
    step(np.ones((1, SIZE), np.float32))
    [found] = optimizer.telemetry()
    assert found["exchange_seconds"] == 0 < found["sent"]


def test_what_a_codec_rounds_off_is_held_back(mirrored):
    optimizer, step = start(
        mirrored(0), tf_regtopk.TopK(0.2), codec=tf_regtopk.Codec(values="sign")
    )
    g = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    step([g])
    [found], [errors] = optimizer.telemetry(), optimizer.residual_errors()
    held = np.concatenate([part.ravel() for part in errors])
    for name, vector in (("residual", held), ("sent", g - held)):
        np.testing.assert_allclose(
            found[name], np.linalg.norm(vector), rtol=1e-5
        )
        np.testing.assert_allclose(
            found[f"{name}_by_variable"], norms(vector), rtol=1e-5
        )


def test_ages(mirrored):
    optimizer, step = start(mirrored(2), tf_regtopk.TopK(0.2), telemetry="ages")
    rng = np.random.default_rng(0)
    ages = np.zeros((2, SIZE))
    for _ in range(4):
        step(rng.standard_normal((2, SIZE)).astype(np.float32))
        after = [
            np.concatenate([part.ravel() for part in of_replica])
            for of_replica in optimizer.residual_errors()
        ]
        ages = np.where(np.array(after) == 0, 0, ages + 1)
        for measured, own in zip(optimizer.telemetry(), ages, strict=True):
            parts = np.split(own, np.cumsum(SIZES)[:-1])
            np.testing.assert_allclose(measured["age"], own.mean(), rtol=1e-6)
            np.testing.assert_allclose(
                measured["age_by_variable"],
                [part.mean() for part in parts],
                rtol=1e-6,
            )
            assert measured["oldest"] == own.max()
    assert ages.max() > 1 and "age" not in telemetry_of_a_step(np.ones(4))


def telemetry_of_a_step(gradient, density=0.01):
    variable = keras.Variable(np.zeros(len(gradient)), dtype="float32")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.1), tf_regtopk.TopK(density), telemetry=True
    )
    optimizer.apply([keras.ops.cast(gradient, "float32")], [variable])
    return optimizer.telemetry()[0]


@pytest.mark.parametrize(
    "scale", [pytest.param(1.0, marks=pytest.mark.slow), 1e30]
)
def test_norms_of_many_and_of_large_entries(scale):
    """A float32 would sum a million squares wrongly, and hold no large one."""
    normal = np.random.default_rng(0).standard_normal(1 << 20)
    g = (scale * normal).astype(np.float32)
    found = telemetry_of_a_step(g, density=1.0)
    norm = np.linalg.norm(g.astype(np.float64))
    assert found["gradient"] == pytest.approx(norm, rel=1e-6)
    assert found["sent"] == pytest.approx(norm, rel=1e-6)
    assert found["residual"] < 1e-6 * norm
    half = telemetry_of_a_step(g, density=0.5)
    small = np.sort(np.abs(g))[: 1 << 19].astype(np.float64)
    assert half["residual"] == pytest.approx(np.linalg.norm(small), rel=1e-6)


def test_counts_of_many_entries():
    """A float32 cannot count beyond 2^24, one by one."""
    found = telemetry_of_a_step(np.ones(20_000_000), density=0.9)
    assert found["selected"] == 18_000_000


def test_a_sample_that_fails():
    """Of fewer entries than k that are not 0 no sample finds the k-th."""
    size = 1 << 17
    normal = np.random.default_rng(0).standard_normal(size)
    assert telemetry_of_a_step(normal)["sample_failed"] == 0
    few = normal * (np.arange(size) % 2000 == 0)
    assert telemetry_of_a_step(few)["sample_failed"] == 1
    assert telemetry_of_a_step(few[:2001])["sample_failed"] == 0


def test_results_are_the_same_without():
    weights = []
    for telemetry in (False, True, "ages"):
        variable = keras.Variable(np.zeros(50), dtype="float32")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            tf_regtopk.RegTopK(0.1),
            telemetry=telemetry,
        )
        for seed in range(3):
            g = np.random.default_rng(seed).standard_normal(50)
            optimizer.apply([keras.ops.cast(g, "float32")], [variable])
        weights.append(variable.numpy())
    np.testing.assert_array_equal(weights[1:], [weights[0]] * 2)


def test_nothing_of_a_dense_exchange(mirrored):
    optimizer, step = start(mirrored(2), tf_regtopk.TopK(0.5), exchange="dense")
    step(np.ones((2, SIZE), np.float32))
    assert optimizer.telemetry() == [{}, {}]


@pytest.mark.parametrize("telemetry", ["age", None, 1])
def test_bad_argument(telemetry):
    with pytest.raises(TypeError, match='`telemetry` must be a boolean or "a'):
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), telemetry=telemetry
        )


def test_not_asked_for():
    variable = keras.Variable(np.zeros(3), dtype="float32")
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), error_feedback=tf_regtopk.EF21()
    )
    with pytest.raises(ValueError, match="must be built before `telemetry`"):
        optimizer.telemetry()
    optimizer.build([variable])
    with pytest.raises(ValueError, match="created with `telemetry=True`"):
        optimizer.telemetry()
    with pytest.raises(ValueError, match="must keep a residual error"):
        optimizer.residual_errors()
