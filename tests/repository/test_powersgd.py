"""PowerSGD as the comparisons simulate it, beside NumPy."""

import itertools
import types

import methods
import numpy as np
import powersgd
import pytest
import tensorflow as tf

from tf_regtopk import simulation

# A convolution, a vector, a matrix, and a matrix too small to gain by it.
SHAPES = ((3, 3, 2, 5), (5,), (12, 7), (2, 2))
SIZES = [int(np.prod(shape)) for shape in SHAPES]
SIZE = sum(SIZES)
NUM_WORKERS, STEPS = 3, 5
MOMENTUM, RATE = 0.75, 0.25


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((STEPS, NUM_WORKERS, SIZE))


def descent(rank):
    optimizer = powersgd.PowerSGD(RATE, MOMENTUM, rank)
    return powersgd.descent_of(optimizer, NUM_WORKERS, SHAPES)


def trained(descent, g):
    """The states after each step, the first before them."""
    states = [descent.initial_state(tf.zeros([SIZE], tf.float64))]
    for t, of_step in enumerate(g):
        states.append(
            descent.step(
                states[-1],
                tf.constant(of_step),
                tf.constant(t),
                tf.constant(RATE, tf.float64),
            )
        )
    return states


def numpy_steps(rank, factors, g):
    """Weights after each step, of one variable after the other."""
    factors = iter(factors)
    weights = np.zeros((len(g), SIZE))
    begin = 0
    for shape, size in zip(SHAPES, SIZES, strict=True):
        end = begin + size
        rows, columns = size // shape[-1], shape[-1]
        has_rank = rank * (rows + columns) < size and len(shape) > 1
        q = next(factors) if has_rank else None
        error = np.zeros((NUM_WORKERS, size))
        w, v = np.zeros(size), np.zeros(size)
        for t, of_step in enumerate(g):
            a = of_step[:, begin:end] + error
            mean = a.mean(axis=0)
            if has_rank:
                m = a.reshape(NUM_WORKERS, rows, columns)
                p, triangle = np.linalg.qr(m.mean(axis=0) @ q)
                # Gram and Schmidt keep the direction of the columns.
                p *= np.sign(np.diag(triangle))
                q = m.mean(axis=0).T @ p
                mean = (p @ q.T).ravel()
                error = a - mean
            v = MOMENTUM * v + RATE * mean
            w = w - v
            weights[t, begin:end] = w
        begin = end
    return weights


@pytest.mark.parametrize("rank", [1, 2])
def test_follows_numpy(rank):
    states = trained(descent(rank), gradients())
    factors = [q.numpy() for q in states[0].shared]
    assert [q.shape for q in factors] == [(5, rank), (7, rank)]
    expected = numpy_steps(rank, factors, gradients())
    for state, weights in zip(states[1:], expected, strict=True):
        np.testing.assert_allclose(state.weights, weights, atol=1e-6)


def test_nothing_is_lost():
    """The mean of gradients and errors is the aggregate and the new errors."""
    g = gradients()
    states = trained(
        powersgd.PowerDescent(simulation.MomentumSGD(), SHAPES, 1, NUM_WORKERS),
        g,
    )
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        aggregate = (before.weights - after.weights) / RATE
        [errors], [new_errors] = before.local, after.local
        np.testing.assert_allclose(
            np.mean(g[t] + errors, axis=0),
            aggregate + np.mean(new_errors, axis=0),
            atol=1e-12,
        )
        assert np.abs(new_errors).max() > 0.1


def test_a_gradient_of_rank_one_arrives_whole():
    rng = np.random.default_rng(0)
    parts = [
        np.outer(rng.standard_normal(s // n), rng.standard_normal(n)).ravel()
        for s, n in zip(SIZES, (shape[-1] for shape in SHAPES), strict=True)
    ]
    g = np.broadcast_to(np.concatenate(parts), (1, NUM_WORKERS, SIZE))
    _, state = trained(descent(1), g)
    np.testing.assert_allclose(state.weights, -RATE * g[0, 0], atol=1e-6)


def test_bytes():
    # 18 x 5 and 12 x 7 are sent as 23 and 19 numbers a rank, 9 as they are; a
    # ring of three sends 4/3 of them.
    assert descent(1).sent_bytes(SIZE) == pytest.approx(4 * 51 * 4 / 3)
    assert descent(2).sent_bytes(SIZE) == pytest.approx(4 * 93 * 4 / 3)
    # Larger than the matrices themselves.
    assert descent(5).sent_bytes(SIZE) == pytest.approx(4 * SIZE * 4 / 3)


def test_other_methods_are_those_of_the_library():
    args = types.SimpleNamespace(
        mu=1.0, denominator="previous", indices="auto", values="float32"
    )
    for name in ("dense", "topk"):
        optimizer = methods.make_optimizer(name, args, RATE, 0.25, MOMENTUM)
        assert powersgd.descent_of(
            optimizer, NUM_WORKERS, SHAPES
        ) == simulation.descent_of(optimizer, NUM_WORKERS)


def test_no_training_takes_it_for_sgd():
    optimizer = powersgd.METHODS["powersgd4"](methods.Hyper(RATE, 0.1, 0.9))
    assert (optimizer.rank, optimizer.momentum) == (4, 0.9)
    variable = tf.Variable([1.0])
    with pytest.raises(NotImplementedError, match="must be simulated"):
        optimizer.apply([tf.constant([1.0])], [variable])
    with pytest.raises(TypeError, match="must be `keras.optimizers.SGD`"):
        simulation.descent_of(optimizer, 2)
    with pytest.raises(ValueError, match="must be sgd for PowerSGD"):
        powersgd.METHODS["powersgd1"](methods.Hyper(RATE, 0.1, adam=True))
