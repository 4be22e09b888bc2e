"""The wrapper against the NumPy reference, on random gradient sequences."""

import flat_gradients
import keras
import numpy as np
import pytest
import reference

import tf_regtopk

SHAPES = [(3, 5), (7,), (), (2, 3, 1), (12, 7)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
STEPS = 30
LEARNING_RATE, MOMENTUM = 0.25, 0.5  # Exact in any float type.

SPARSIFIERS = {
    "topk": lambda density: tf_regtopk.TopK(density),
    "regtopk": lambda density: tf_regtopk.RegTopK(density, mu=1.5),
    "regtopk_current": lambda density: tf_regtopk.RegTopK(
        density, mu=1.5, denominator="current"
    ),
    # With so small a Q even entries that were not sent are damped.
    "regtopk_small_q": lambda density: tf_regtopk.RegTopK(
        density, mu=2.0, q=0.5
    ),
    "regtopk_current_small_q": lambda density: tf_regtopk.RegTopK(
        density, mu=2.0, q=0.5, denominator="current"
    ),
    "randomk": lambda density: tf_regtopk.RandomK(density, seed=3),
}
REFERENCES = {
    "topk": dict(method="topk"),
    "regtopk": dict(method="regtopk", mu=1.5),
    "regtopk_current": dict(method="regtopk", mu=1.5, denominator="current"),
    "regtopk_small_q": dict(method="regtopk", mu=2.0, q=0.5),
    "regtopk_current_small_q": dict(
        method="regtopk", mu=2.0, q=0.5, denominator="current"
    ),
    "randomk": dict(method="randomk", seed=3),
}


def random_gradients(rng, num_replicas):
    """`[steps, replicas, entries]`, with what makes replicas interact.

    A part common to all replicas, a part that cancels in the sum, layers of
    different scale, and a few exact zeros.
    """
    shape = (STEPS, num_replicas, sum(SIZES))
    own = rng.standard_normal(shape)
    common = 0.5 * rng.standard_normal((1, 1, shape[2]))
    bias = 2.0 * rng.standard_normal((1, *shape[1:]))
    bias -= bias.mean(axis=1, keepdims=True)
    scale = np.repeat(2.0 ** np.arange(len(SIZES)), SIZES)
    gradients = (own + common + bias) * scale
    return np.where(rng.random(shape) < 0.02, 0.0, gradients)


def run_wrapper(strategy, sparsifier, scope, gradients, dtype="float64"):
    """Yields every replica's flat weights after each step."""
    num_replicas = gradients.shape[1]
    with strategy.scope():
        variables = [
            keras.Variable(np.ones(shape), dtype=dtype) for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
            sparsifier,
            scope=scope,
        )

    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    for g in gradients:
        # Keras divides the local losses by the number of replicas.
        take_step(g / num_replicas)
        yield np.array(
            [
                np.concatenate(
                    [
                        strategy.experimental_local_results(v.value)[n]
                        .numpy()
                        .ravel()
                        for v in variables
                    ]
                )
                for n in range(num_replicas)
            ]
        )


def check_against_reference(
    strategy, num_replicas, name, density, scope, seed, dtype, tolerance
):
    gradients = random_gradients(np.random.default_rng(seed), num_replicas)
    workers = reference.Workers(
        num_workers=num_replicas,
        sizes=SIZES,
        density=density,
        scope=scope,
        **REFERENCES[name],
    )
    weights = np.ones(sum(SIZES))
    velocity = np.zeros(sum(SIZES))
    replica_weights = run_wrapper(
        strategy, SPARSIFIERS[name](density), scope, gradients, dtype
    )
    for t, actual in enumerate(replica_weights):
        velocity = MOMENTUM * velocity - LEARNING_RATE * workers.step(
            gradients[t]
        )
        weights = weights + velocity
        for n, actual_n in enumerate(actual):
            np.testing.assert_array_equal(actual_n, actual[0])
            np.testing.assert_allclose(
                actual_n,
                weights,
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"step {t}, replica {n}",
            )
    assert t == STEPS - 1


# Each sparsifier with both scopes and several densities and numbers.
CASES = [
    ("topk", 0, 0.37, "per_variable"),
    pytest.param("topk", 2, 1e-9, "global", marks=pytest.mark.slow),
    pytest.param("topk", 3, 0.7, "per_variable", marks=pytest.mark.slow),
    pytest.param("regtopk", 0, 1.0, "per_variable", marks=pytest.mark.slow),
    ("regtopk", 2, 0.1, "per_variable"),
    ("regtopk", 3, 0.37, "global"),
    pytest.param("regtopk", 5, 0.1, "global", marks=pytest.mark.slow),
    ("regtopk_current", 1, 0.1, "global"),
    pytest.param(
        "regtopk_current", 3, 0.7, "per_variable", marks=pytest.mark.slow
    ),
    pytest.param("randomk", 1, 0.37, "per_variable", marks=pytest.mark.slow),
    ("randomk", 2, 0.1, "global"),
    pytest.param(
        "regtopk_small_q", 3, 0.37, "per_variable", marks=pytest.mark.slow
    ),
    pytest.param(
        "regtopk_current_small_q", 2, 0.1, "global", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("name, num_replicas, density, scope", CASES)
def test_weights_follow_the_reference(
    name, num_replicas, density, scope, mirrored
):
    check_against_reference(
        mirrored(num_replicas),
        max(num_replicas, 1),
        name,
        density=density,
        scope=scope,
        seed=num_replicas,
        dtype="float64",
        tolerance=1e-9,
    )


@pytest.mark.parametrize(
    "name, scope", [("topk", "per_variable"), ("regtopk", "global")]
)
def test_weights_in_float32(name, scope, mirrored):
    check_against_reference(
        mirrored(2), 2, name, 0.2, scope, 0, dtype="float32", tolerance=1e-4
    )


def test_the_methods_differ_on_these_gradients():
    """The comparison above could tell one method from another."""
    gradients = random_gradients(np.random.default_rng(1), 3)
    totals = []
    for arguments in REFERENCES.values():
        workers = reference.Workers(
            num_workers=3, sizes=SIZES, density=0.5, **arguments
        )
        totals.append(sum(workers.step(g) for g in gradients))
    for i, total in enumerate(totals):
        for other in totals[:i]:
            assert not np.allclose(total, other)
