"""Replicas with weights of their own, in one process, and under `fit`."""

import functools
import itertools

import decentralized_program
import gossip_reference
import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk

RING = tf_regtopk.Ring()
MATRICES = {
    2: RING,
    3: RING,  # An odd ring takes three rounds.
    4: tf_regtopk.OnePeerExponential(),
}


def local_weights(strategy, model):
    """`[N, J]`, the trainable weights of the replicas."""
    return np.stack(
        decentralized_program.local_weights(strategy, model.trainable_variables)
    )


def fit(strategy, inner="sgd", topology=RING, **kwargs):
    """A model after `fit` without the average at its end."""
    arguments = {
        name: kwargs.pop(name)
        for name in (
            *("data", "callbacks", "epochs", "build_fn", "batch_size"),
            *("run_eagerly", "steps_per_execution", "jit_compile"),
        )
        if name in kwargs
    }
    kwargs = {"average_at_end": False, **kwargs}
    return small_models.fit(
        strategy,
        lambda: tf_regtopk.DecentralizedOptimizer(
            small_models.INNER_OPTIMIZERS[inner](), topology, **kwargs
        ),
        **{"data": small_models.small_data(48), **arguments},
    )


def gradient_of(x, t, i):
    """The gradient of replica i at the weights x, of another loss each."""
    return (x - np.cos(np.arange(len(x)) + 3 * i)) * (1 + 0.1 * np.sin(t))


@pytest.mark.parametrize(
    "twin, n, kwargs",
    [
        (gossip_reference.DPSGD, 2, dict(topology=RING)),
        (gossip_reference.DPSGD, 3, dict(topology=RING)),
        (gossip_reference.DPSGD, 4, dict()),
        (gossip_reference.DPSGD, 4, dict(communication_period=2)),
        (
            gossip_reference.CHOCO,
            3,
            dict(topology=RING, error_feedback=tf_regtopk.EF21(), density=0.2),
        ),
        (
            gossip_reference.DeepSqueeze,
            4,
            dict(error_feedback=tf_regtopk.Accumulate(), density=0.2),
        ),
    ],
)
def test_equals_the_paper(twin, n, kwargs, mirrored):
    """The gradients depend on the weights, of which each replica has its."""
    strategy, size, lr, gamma = mirrored(n), 23, 0.1, 1.0
    kwargs = dict(kwargs)
    compress = gossip_reference.everything
    if density := kwargs.pop("density", None):
        gamma = 0.4
        kwargs["sparsifier"] = tf_regtopk.TopK(density)
        kwargs["consensus_step_size"] = gamma
        k = kwargs["sparsifier"].num_selected(size)
        compress = functools.partial(gossip_reference.top_k, k=k)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    with strategy.scope():
        variable = keras.Variable(x, dtype="float32")
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(lr), **kwargs
        )
        optimizer.build([variable])

    @tf.function(autograph=False)
    def step(t):
        def of_replica():
            replica = tf.distribute.get_replica_context()
            i = tf.cast(replica.replica_id_in_sync_group, tf.float32)
            shift = tf.cos(tf.range(float(size)) + 3 * i)
            g = (tf.convert_to_tensor(variable) - shift) * (1 + 0.1 * tf.sin(t))
            optimizer.apply([g / n], [variable])

        strategy.run(of_replica)

    expected = twin(np.tile(x.astype(float), (n, 1)), compress, gamma)
    topology = optimizer.topology
    matrices = topology.mixing_matrices(n)
    period = optimizer.communication_period
    for t in range(10):
        step(tf.constant(t, tf.float32))
        g = [gradient_of(row, t, i) for i, row in enumerate(expected.x)]
        w = np.eye(n)
        if t % period == 0:
            w = matrices[t // period % len(matrices)]
        expected.step(w, -lr * np.array(g))
        actual = decentralized_program.local_weights(strategy, [variable])
        np.testing.assert_allclose(actual, expected.x, atol=2e-5)
    assert gossip_reference.disagreement(expected.x) > 0.05
    assert optimizer.iterations.numpy() == 10


@pytest.mark.parametrize(
    "n, topology, inner",
    [
        (3, RING, "adam"),
        (4, MATRICES[4], "momentum"),
        *(
            pytest.param(n, topology, inner, marks=pytest.mark.slow)
            for n, topology in MATRICES.items()
            for inner in ("momentum", "adam")
        ),
    ],
)
def test_fit(n, topology, inner, mirrored):
    distances = tf_regtopk.ConsensusDistance()
    model = fit(mirrored(n), inner, topology, epochs=4, callbacks=[distances])
    history = model.history.history
    assert history["loss"][-1] < history["loss"][0]
    weights = local_weights(mirrored(n), model)
    distance = gossip_reference.disagreement(weights)
    assert distance > 1e-3
    assert history["consensus_distance"][-1] == pytest.approx(distance, 1e-4)
    assert model.optimizer.zeroed_gradients == [0] * n


@pytest.mark.parametrize(
    "n, topology, rho",
    [(4, RING, 1 / 3), (3, RING, 0), (4, tf_regtopk.Grid(2), 1)],
)
def test_without_learning_the_replicas_come_together(
    n, topology, rho, mirrored
):
    """The squared distance falls by rho^2 a step; the mean stays."""
    strategy = mirrored(n)
    optimizer, variables = decentralized_program.make(
        strategy, learning_rate=0.0, topology=topology
    )
    rng = np.random.default_rng(5)
    for variable in variables:
        for part in strategy.experimental_local_results(variable.value):
            part.assign_add(rng.standard_normal(part.shape))
    weights = [decentralized_program.local_weights(strategy, variables)]
    gradients = [tf.zeros(v.shape) for v in variables]
    step = tf.function(
        lambda: strategy.run(lambda: optimizer.apply(gradients, variables)),
        autograph=False,
    )
    for _ in range(4):
        step()
        weights.append(decentralized_program.local_weights(strategy, variables))
    distances = [gossip_reference.disagreement(np.stack(w)) for w in weights]
    assert distances[0] > 1
    for before, after in itertools.pairwise(distances):
        assert after**2 <= rho**2 * before**2 * (1 + 1e-4) + 1e-12
    if rho == 1:  # Of each two steps, which reach the mean.
        assert distances[1] > 0.1
        assert distances[2] < 1e-6
    np.testing.assert_allclose(
        np.mean(weights[-1], axis=0), np.mean(weights[0], axis=0), atol=1e-6
    )


def test_a_bad_gradient_of_one_replica_counts_as_zeros(mirrored):
    expected = decentralized_program.gradients()
    expected[1, 2] = 0
    expected = decentralized_program.train(mirrored(4), expected)
    g = decentralized_program.gradients(is_bad=True)
    optimizer = None

    def make(*args, make=decentralized_program.make, **kwargs):
        nonlocal optimizer
        optimizer, variables = make(*args, **kwargs)
        return optimizer, variables

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(decentralized_program, "make", make)
        actual = decentralized_program.train(mirrored(4), g)
    np.testing.assert_array_equal(actual, expected)
    assert optimizer.zeroed_gradients == [0, 0, 1, 0]
    assert optimizer.iterations.numpy() == len(g)
    assert optimizer.skipped_steps.numpy() == 0


@pytest.mark.parametrize("values", ["float32", "float16", "natural"])
def test_weights_that_are_lost_are_not_passed_on(values, mirrored):
    strategy = mirrored(2)
    optimizer, variables = decentralized_program.make(
        strategy, codec=tf_regtopk.Codec(values=values)
    )
    take_step = tf.function(
        lambda: strategy.run(
            lambda: optimizer.apply(
                [tf.zeros(v.shape) for v in variables], variables
            )
        ),
        autograph=False,
    )
    take_step()
    [_, second] = strategy.experimental_local_results(variables[1].value)
    second.assign(tf.fill(second.shape, np.inf))
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be finite"):
        take_step()
    [first, _] = strategy.experimental_local_results(variables[1].value)
    assert np.isfinite(first.numpy()).all()


def test_no_weights_to_mix(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(np.zeros([0, 3]), dtype="float32")
        optimizer = tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD())
        optimizer.build([variable])
    strategy.run(
        tf.function(lambda: optimizer.apply([tf.zeros([0, 3])], [variable]))
    )
    assert optimizer.iterations.numpy() == 1
    with pytest.raises(ValueError, match="of several replicas that have wei"):
        optimizer.wire_report()


@pytest.mark.parametrize("g", [1.0, np.nan])
def test_what_is_overwritten_is_no_gradient(g, mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        weights = keras.Variable(np.zeros(4, "float32"))
        scale = keras.Variable(1.0)
        scale.overwrite_with_gradient = True
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.1), RING
        )
        optimizer.build([weights, scale])
    strategy.run(
        tf.function(
            lambda: optimizer.apply(
                [tf.fill([4], g), tf.constant(3.0)], [weights, scale]
            ),
            autograph=False,
        )
    )
    parts = strategy.experimental_local_results(scale.value)
    assert [part.numpy() for part in parts] == [3.0, 3.0]


def test_missing_gradients_and_slices(mirrored):
    """Weights are mixed in any case; a row of an embedding is one's own."""
    strategy = mirrored(2)
    with strategy.scope():
        table = tf.Variable(tf.zeros([4, 2]))  # Also not of Keras.
        other = keras.Variable(np.zeros(3), dtype="float32")
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(1.0), RING
        )

    @tf.function(autograph=False)
    def step():
        def of_replica():
            replica = tf.distribute.get_replica_context()
            rank = replica.replica_id_in_sync_group
            slices = tf.IndexedSlices(
                tf.ones([1, 2]), tf.reshape(rank, [1]), tf.constant([4, 2])
            )
            optimizer.apply([slices, None], [table, other])

        strategy.run(of_replica)

    step()
    parts = strategy.experimental_local_results(table)
    for rank, part in enumerate(parts):
        expected = np.zeros((4, 2))
        expected[rank] = -2  # The gradient carries the weight 1 / N.
        np.testing.assert_array_equal(part.numpy(), expected)
    step()
    for rank, part in enumerate(parts):
        expected = np.zeros((4, 2))
        expected[:2] = -1
        expected[rank] -= 2
        np.testing.assert_array_equal(part.numpy(), expected)


def test_graph_eager_and_loops_agree(mirrored):
    models = [
        fit(mirrored(2), "momentum", **kwargs)
        for kwargs in (
            dict(),
            dict(run_eagerly=True),
            dict(steps_per_execution=2),
        )
    ]
    expected, *others = (local_weights(mirrored(2), m) for m in models)
    for weights in others:
        np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`jit_compile` must be False"):
        fit(mirrored(2), jit_compile=True)


def test_the_average_at_the_end(mirrored):
    """As without it, and then the mean on all replicas; a fit goes on."""
    apart = fit(mirrored(3), "momentum")
    together = fit(mirrored(3), "momentum", average_at_end=True)
    weights = local_weights(mirrored(3), together)
    np.testing.assert_array_equal(weights, weights[[0, 0, 0]])
    np.testing.assert_allclose(
        weights[0], local_weights(mirrored(3), apart).mean(axis=0), atol=1e-6
    )
    assert together.optimizer.replicas_agree
    assert not apart.optimizer.replicas_agree
    x, y = small_models.small_data(48)
    loss = together.evaluate(x, y, batch_size=12, verbose=0)[0]
    history = together.fit(x, y, batch_size=12, epochs=5, verbose=0).history
    assert history["loss"][-1] < loss


@pytest.mark.parametrize(
    "rule",
    [
        tf_regtopk.EF21(),
        pytest.param(tf_regtopk.NoFeedback(), marks=pytest.mark.slow),
    ],
)
def test_another_optimizer_starts_with_the_average(rule, mirrored, caplog):
    """As after a `fit` that was interrupted."""
    strategy = mirrored(3)
    model = fit(strategy)
    before = local_weights(strategy, model)
    assert gossip_reference.disagreement(before) > 1e-2
    with strategy.scope():
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(0.0),
            RING,
            error_feedback=rule,
            average_at_end=False,
        )
        model.compile(optimizer, loss="mse")
    x, y = small_models.small_data(48)
    model.fit(x, y, batch_size=12, verbose=0)
    assert "The replicas had weights of their own" in caplog.text
    after = local_weights(strategy, model)
    np.testing.assert_allclose(after, [before.mean(axis=0)] * 3, atol=1e-6)
    assert model.optimizer.replicas_agree


def test_unwrapping_averages(mirrored):
    strategy = mirrored(3)
    model = fit(strategy)
    mean = local_weights(strategy, model).mean(axis=0)
    model = tf_regtopk.unwrap(model)
    assert type(model.optimizer) is keras.optimizers.SGD
    np.testing.assert_allclose(
        local_weights(strategy, model), [mean] * 3, atol=1e-6
    )


def test_averaged_in_a_custom_loop(mirrored):
    strategy = mirrored(3)
    model = fit(strategy)
    optimizer = model.optimizer
    model.compiled, model.optimizer = False, None
    with (
        pytest.raises(ValueError, match="`model` must be compiled with a"),
        tf_regtopk.averaged(model),
    ):
        pass
    with tf_regtopk.averaged(model, optimizer):
        weights = local_weights(strategy, model)
        np.testing.assert_array_equal(weights, weights[[0, 0, 0]])
    assert not optimizer.replicas_agree


def with_batch_norm():
    return keras.Sequential(
        [
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )


def test_averaged_gives_back(mirrored, tmp_path, caplog):
    strategy = mirrored(3)
    model = fit(strategy, "adam", build_fn=with_batch_norm)

    def all_weights():
        return np.stack(
            decentralized_program.local_weights(strategy, model.weights)
        )

    before = all_weights()
    assert gossip_reference.disagreement(before) > 1e-2
    with tf_regtopk.averaged(model):
        inside = all_weights()
        np.testing.assert_array_equal(inside, inside[[0, 0, 0]])
        np.testing.assert_allclose(inside[0], before.mean(axis=0), atol=1e-6)
        with tf_regtopk.averaged(model):
            np.testing.assert_allclose(all_weights(), inside, atol=1e-6)
        assert model.optimizer.replicas_agree
        model.save(tmp_path / "average.keras")
    np.testing.assert_array_equal(all_weights(), before)
    assert "THE FILE HOLDS" not in caplog.text
    model.save(tmp_path / "first.keras")
    assert "THE FILE HOLDS THE WEIGHTS OF ONE REPLICA" in caplog.text
    first = keras.models.load_model(tmp_path / "first.keras")
    np.testing.assert_array_equal(
        np.concatenate([w.ravel() for w in first.get_weights()]), before[0]
    )
    assert "training goes on with a new optimizer" in caplog.text
    loaded = keras.models.load_model(tmp_path / "average.keras")
    np.testing.assert_array_equal(
        np.concatenate([w.ravel() for w in loaded.get_weights()]), inside[0]
    )
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    # It goes on in one process, and with several replicas.
    x, y = small_models.small_data(48)
    loaded.fit(x, y, verbose=0)
    with strategy.scope():
        again = keras.models.load_model(tmp_path / "average.keras")
    again.fit(x, y, batch_size=12, verbose=0)


def test_the_average_is_evaluated(mirrored):
    x, y = small_models.small_data(48)
    evaluate = tf_regtopk.EvaluateAverage(x, y, batch_size=12)
    model = fit(mirrored(2), "momentum", epochs=2, callbacks=[evaluate])
    expected = fit(mirrored(2), "momentum", epochs=2)
    np.testing.assert_array_equal(
        local_weights(mirrored(2), model), local_weights(mirrored(2), expected)
    )
    history = model.history.history
    assert history["loss"] == expected.history.history["loss"]
    with tf_regtopk.averaged(model):
        results = model.evaluate(
            x, y, batch_size=12, verbose=0, return_dict=True
        )
    for name, value in results.items():
        assert history[f"average_{name}"][-1] == pytest.approx(value)


@pytest.mark.parametrize(
    "way", ["keras", pytest.param("checkpoint", marks=pytest.mark.slow)]
)
def test_a_single_replica_saves_all(way, tmp_path):
    """It is the inner optimizer alone, and goes on to the bit."""
    models = [
        fit(tf.distribute.get_strategy(), "adam", build_fn=build)
        for build in (small_models.build_mlp,) * 2
    ]
    plain = small_models.fit(
        tf.distribute.get_strategy(),
        small_models.INNER_OPTIMIZERS["adam"],
        data=small_models.small_data(48),
    )
    small_models.assert_weights_equal(models[0], plain)
    saved, other = models
    x, y = small_models.small_data(48)
    saved.fit(x, y, verbose=0, shuffle=False)
    if way == "keras":
        saved.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    else:
        path = tf.train.Checkpoint(model=saved).save(tmp_path / "checkpoint")
        tf.train.Checkpoint(model=other).restore(path)
    assert other.optimizer.iterations.numpy() == 6
    for model in (saved, other):
        model.fit(x, y, verbose=0, shuffle=False)
    small_models.assert_weights_equal(saved, other)
