"""`exchange=`: sparse, dense, and the faster of the two."""

import types

import exchange_program
import flat_gradients
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.steps import auto_exchange

RULES = {
    "accumulate": tf_regtopk.Accumulate(),
    "momentum": tf_regtopk.Accumulate(momentum=0.9),
    "dgc": tf_regtopk.Accumulate(momentum=0.9, factor_masking=True),
    "none": tf_regtopk.NoFeedback(),
    "ef21": tf_regtopk.EF21(),
    "ef21 sgdm": tf_regtopk.EF21(momentum=0.1),
    "shift": tf_regtopk.LearnedShift(),
    "shift momentum": tf_regtopk.LearnedShift(momentum=0.9),
    "downlink": tf_regtopk.CompressedDownlink(
        tf_regtopk.LearnedShift(momentum=0.9)
    ),
}


def test_hierarchical_in_one_process_is_one_replica(mirrored):
    """All devices of the only worker sum their gradients."""
    g = exchange_program.gradients(3)
    actual, saved = exchange_program.train(mirrored(3), g, hierarchical=True)
    expected, _ = exchange_program.train(
        tf.distribute.get_strategy(), g.sum(axis=1, keepdims=True)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert saved.num_replicas == 1 and list(saved.replicas) == [0]


@pytest.mark.parametrize("rule", RULES)
def test_dense_is_what_keras_does(rule, mirrored):
    """With the momentum of the rule; EF21-SGDM averages instead of adding."""
    num_replicas = 3
    g = exchange_program.gradients(num_replicas)
    momentum = getattr(RULES[rule], "momentum", 0.0)
    scale = 1.0
    if rule.startswith("ef21"):
        momentum, scale = 1 - momentum, momentum
    if rule == "downlink":
        momentum = 0.9
    strategy = mirrored(num_replicas)
    weights = []
    for wrapped in (True, False):
        with strategy.scope():
            variables = [
                keras.Variable(np.zeros(s), dtype="float32")
                for s in exchange_program.SHAPES
            ]
            if wrapped:
                optimizer = tf_regtopk.SparsifiedOptimizer(
                    keras.optimizers.SGD(0.5),
                    error_feedback=RULES[rule],
                    exchange="dense",
                )
            else:
                optimizer = keras.optimizers.SGD(0.5 * scale, momentum=momentum)
            optimizer.build(variables)
        take_step = flat_gradients.step_function(strategy, optimizer, variables)
        for step_gradients in g:
            take_step(step_gradients)
        weights.append(flat_gradients.flat_weights(variables))
        if wrapped:
            assert optimizer.chosen_exchange == "dense"
            report = optimizer.wire_report()
            assert report.payload_bytes == 0
            assert report.dense_below_bytes == 4 * exchange_program.SIZE
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-5)


def test_momentum_stays_where_there_is_no_gradient():
    variables = [tf.Variable([0.0, 0.0]), tf.Variable([0.0])]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0),
        error_feedback=tf_regtopk.LearnedShift(momentum=0.5),
        exchange="dense",
    )
    for gradients in (
        [tf.constant([1.0, 2.0]), tf.constant([4.0])],
        [None, tf.constant([4.0])],
        [tf.constant([1.0, 2.0]), None],
    ):
        optimizer.apply(gradients, variables)
    # The momentum of the first is 0.5 in the third step, not 0.25.
    np.testing.assert_allclose(variables[0].numpy(), [-2.5, -5.0])
    np.testing.assert_allclose(variables[1].numpy(), [-10.0])


def test_nan_is_skipped_in_a_dense_exchange(mirrored):
    strategy = mirrored(2)
    for rule in (tf_regtopk.Accumulate(), tf_regtopk.Accumulate(momentum=0.9)):
        with strategy.scope():
            variable = keras.Variable(np.zeros(4), dtype="float32")
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0), error_feedback=rule, exchange="dense"
            )
            optimizer.build([variable])
        take_step = flat_gradients.step_function(
            strategy, optimizer, [variable]
        )
        g = np.ones((2, 4), np.float32)
        take_step(g)
        before = variable.numpy()
        bad = g.copy()
        bad[1, 2] = np.nan
        take_step(bad)
        np.testing.assert_array_equal(variable.numpy(), before)
        assert optimizer.skipped_steps.numpy() == 1
        take_step(g)
        assert (variable.numpy() < before).all()


@pytest.mark.parametrize(
    "faster", ["sparse", pytest.param("dense", marks=pytest.mark.slow)]
)
def test_auto_takes_the_faster_one(faster, mirrored, monkeypatch):
    seconds = {"sparse": 0.1, "dense": 0.1}
    seconds[faster] = 0.05
    measured = []

    def measure(exchanges):
        # They run, and change nothing that training starts with.
        strategy = tf.distribute.get_strategy()
        for name, function in exchanges.items():
            strategy.run(tf.function(function))
            measured.append(name)
        return seconds

    monkeypatch.setattr(auto_exchange, "measure", measure)
    made = exchange_program.make(mirrored(2), exchange="auto")
    optimizer, _ = made
    assert measured == ["sparse", "dense"]
    assert optimizer.chosen_exchange == faster
    assert optimizer.exchange_seconds == seconds
    report = str(optimizer.wire_report())
    assert f"{faster} (measured a step: sparse " in report
    assert f"{faster} 50.0 ms" in report
    g = exchange_program.gradients(2)
    actual, _ = exchange_program.train(mirrored(2), g, made=made)
    expected, _ = exchange_program.train(mirrored(2), g, exchange=faster)
    assert actual == expected


def test_auto_measures(mirrored):
    """Here both are quick; what counts is that it is all there."""
    optimizer, _ = exchange_program.make(mirrored(2), exchange="auto")
    seconds = optimizer.exchange_seconds
    assert set(seconds) == {"sparse", "dense"}
    assert all(0 < s < 60 for s in seconds.values())
    assert optimizer.chosen_exchange == auto_exchange.choose(seconds)
    single, _ = exchange_program.make(
        tf.distribute.get_strategy(), exchange="auto"
    )
    assert single.chosen_exchange == "dense"
    assert single.exchange_seconds is None


def test_auto_when_built_by_the_first_step(mirrored):
    strategy = mirrored(2)
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1),
            tf_regtopk.TopK(0.5),
            exchange="auto",
        )
        model.compile(optimizer=optimizer, loss="mse")
    assert optimizer.chosen_exchange is None
    model.fit(x, x[:, :2], batch_size=4, verbose=0)
    assert optimizer.chosen_exchange in ("sparse", "dense")
    assert optimizer.iterations.numpy() == 2


def test_a_run_goes_on_by_the_exchange_it_was_saved_with(mirrored, monkeypatch):
    g = exchange_program.gradients(2)
    for saved_with, chosen in (("sparse", "dense"), ("dense", "sparse")):
        seconds = {"sparse": 1.0, "dense": 1.0, chosen: 0.1}
        monkeypatch.setattr(
            auto_exchange, "measure", lambda _, seconds=seconds: seconds
        )
        _, saved = exchange_program.train(
            mirrored(2), g, "shift", exchange=saved_with
        )
        auto, _ = exchange_program.make(mirrored(2), "shift", exchange="auto")
        assert auto.chosen_exchange == chosen
        auto.load_state(saved)
        assert auto.chosen_exchange == saved_with
        loaded = auto.save_state()
        np.testing.assert_equal(loaded.replicas, saved.replicas)
        np.testing.assert_equal([*loaded.shared], [*saved.shared])
        other, _ = exchange_program.make(mirrored(2), "shift", exchange=chosen)
        before = other.save_state()
        with pytest.raises(ValueError, match=f'"auto" or "{saved_with}"'):
            other.load_state(saved)
        assert str(other.save_state()) == str(before)


def test_measure_waits_for_the_slowest(mirrored):
    """An exchange that takes longer is found to, in a scope of replicas."""

    def work(size):
        def run():
            x = tf.random.normal([size, size])  # No constant to fold.
            return tf.reduce_sum(tf.linalg.matmul(x, x))

        return run

    with mirrored(2).scope():
        seconds = auto_exchange.measure(
            {"sparse": work(2), "dense": work(1500)}
        )
    assert auto_exchange.choose(seconds) == "sparse"


def test_tracing_and_faster_workers_are_not_measured(monkeypatch):
    """By a clock that goes on while a function is traced."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(auto_exchange, "time", clock)
    other_worker = [7, 9]
    monkeypatch.setattr(
        auto_exchange.collectives,
        "gather_from_workers",
        lambda row, _: np.array([row, other_worker]),
    )

    def traced_in(seconds):
        def run():
            now[0] += seconds
            return tf.zeros([])

        return run

    found = auto_exchange.measure(
        {"sparse": traced_in(99), "dense": traced_in(0)}
    )
    assert found == pytest.approx({"sparse": 7e-6, "dense": 9e-6})


def test_gradients_are_clipped_where_they_are_summed():
    for kwargs in ({"exchange": "dense"}, {"dense_below": 99}):
        variable = keras.Variable(np.zeros(2), dtype="float32")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.5),
            error_feedback=tf_regtopk.Accumulate(clip_norm=1.0),
            **kwargs,
        )
        optimizer.apply([tf.constant([6.0, 8.0])], [variable])
        np.testing.assert_allclose(variable, [-0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"exchange": "ring"}, "`exchange` must be"),
        (
            {"hierarchical": True, "codec": tf_regtopk.Codec("golomb")},
            "`codec` must write indices in a fixed length",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(), **kwargs)
    with pytest.raises(TypeError, match="`hierarchical` must be"):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(), hierarchical=1)


def test_a_rule_without_a_dense_form_is_refused():
    class Rule(tf_regtopk.Accumulate):
        when_dense = tf_regtopk.ErrorFeedback.when_dense

    for exchange in ("dense", "auto"):
        with pytest.raises(ValueError, match="`exchange` must be"):
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(), error_feedback=Rule(), exchange=exchange
            )


def test_config():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), exchange="auto", hierarchical=True
    )
    config = keras.saving.serialize_keras_object(optimizer)
    copy = keras.saving.deserialize_keras_object(config)
    assert (copy.exchange, copy.hierarchical) == ("auto", True)


MOMENTUM_RULES = [
    tf_regtopk.Accumulate(0.75, factor_masking=False),
    pytest.param(tf_regtopk.EF21(0.25), marks=pytest.mark.slow),
    pytest.param(
        tf_regtopk.LearnedShift(momentum=0.75), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("rule", MOMENTUM_RULES, ids=str)
def test_small_variables_have_the_momentum_of_the_rule(rule, mirrored):
    """At density 1 all exchanges are the same, whatever is dense in them."""
    strategy = mirrored(2)
    rng = np.random.default_rng(0)
    per_step = rng.standard_normal((4, 2, 9))
    results = []
    for kwargs in (
        {},
        {"dense_below": 5},
        {"dense_below": 99},
        {"exchange": "dense", "dense_below": 5},
    ):
        with strategy.scope():
            variables = [tf.Variable(tf.zeros([n], tf.float64)) for n in (6, 3)]
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.5),
                tf_regtopk.TopK(1.0),
                error_feedback=rule,
                **kwargs,
            )
            optimizer.build(variables)

        @tf.function(autograph=False)
        def step(g, optimizer=optimizer, variables=variables):
            def apply():
                replica = tf.distribute.get_replica_context()
                mine = tf.gather(g, replica.replica_id_in_sync_group)
                optimizer.apply([mine[:6], mine[6:]], variables)

            strategy.run(apply)

        for number, g in enumerate(per_step):
            if number == 2:  # The state is saved, and is all there is.
                saved = optimizer.save_state()
                optimizer.load_state(
                    saved._replace(
                        replicas={
                            n: [np.zeros_like(part) for part in parts]
                            for n, parts in saved.replicas.items()
                        },
                        shared=[np.zeros_like(part) for part in saved.shared],
                    )
                )
                assert str(optimizer.save_state()) != str(saved)
                optimizer.load_state(saved)
            step(tf.constant(g))
        results.append(np.concatenate([v.numpy() for v in variables]))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-12)


def test_small_variables_of_a_rule_without_a_dense_form_are_summed():
    class Rule(tf_regtopk.Accumulate):
        when_dense = tf_regtopk.ErrorFeedback.when_dense

    variable = tf.Variable(tf.zeros([3]))
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), error_feedback=Rule(0.5), dense_below=5
    )
    for _ in range(2):
        optimizer.apply([tf.ones([3])], [variable])
    np.testing.assert_array_equal(variable, [-2, -2, -2])
