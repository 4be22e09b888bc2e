"""The reduce-scatter of entries, in one process, against NumPy and itself."""

import dataclasses

import flat_gradients
import keras
import multi_worker_launcher
import numpy as np
import pytest
import reference
import reversed_devices_program
import tensorflow as tf

import tf_regtopk
from tf_regtopk.kernels import ownership
from tf_regtopk.steps import auto_exchange

SHAPES = [(3, 5), (7,), (), (2, 3, 1), (12, 7)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
SIZE = sum(SIZES)
STEPS = 12


def gradients(num_replicas, seed=0):
    """`[steps, replicas, J]`, with a part that the replicas cancel."""
    rng = np.random.default_rng(seed)
    shape = (STEPS, num_replicas, SIZE)
    bias = 2.0 * rng.standard_normal((1, *shape[1:]))
    bias -= bias.mean(axis=1, keepdims=True)
    common = 0.5 * rng.standard_normal((1, 1, SIZE))
    return rng.standard_normal(shape) + common + bias


def make(strategy, dtype="float64", **kwargs):
    """An optimizer and its variables, all zeros."""
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype=dtype) for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), **kwargs
        )
        optimizer.build(variables)
    return optimizer, variables


def train(strategy, g, **kwargs):
    """Weights after each step, the optimizer, the step, and the variables."""
    optimizer, variables = make(strategy, **kwargs)
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    weights = []
    for of_step in g:
        take_step(of_step)
        weights.append(flat_gradients.flat_weights(variables))
    return np.array(weights), optimizer, take_step, variables


def residual(optimizer):
    """The sum of the residual errors of all replicas, `[J]`."""
    return sum(
        np.concatenate([np.ravel(part) for part in of_replica])
        for of_replica in optimizer.residual_errors()
    )


CASES = [
    # Sparsifier, rule, the reference's, number of replicas, keep.
    pytest.param(
        *("topk", tf_regtopk.Accumulate(), reference.Accumulate, 2, 1.0),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("regtopk", tf_regtopk.Accumulate(), reference.Accumulate, 3, 1.0),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("regtopk", tf_regtopk.EF21(), reference.EF21, 3, 0.5),
        marks=pytest.mark.slow,
    ),
    ("regtopk", tf_regtopk.LearnedShift(), reference.LearnedShift, 3, 1.5),
    (
        "topk",
        tf_regtopk.LearnedShift(momentum=0.5, factor_masking=True),
        lambda: reference.LearnedShift(momentum=0.5, factor_masking=True),
        2,
        0.5,
    ),
    pytest.param(
        "topk",
        tf_regtopk.Accumulate(momentum=0.5, factor_masking=True),
        lambda: reference.Accumulate(momentum=0.5, factor_masking=True),
        3,
        1.0,
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("name, rule, expected_rule, num_replicas, keep", CASES)
def test_weights_follow_the_reference(
    name, rule, expected_rule, num_replicas, keep, mirrored
):
    g = gradients(num_replicas)
    sparsifier = {"topk": tf_regtopk.TopK, "regtopk": tf_regtopk.RegTopK}[name]
    actual, *_ = train(
        mirrored(num_replicas),
        g / num_replicas,
        sparsifier=sparsifier(0.3),
        error_feedback=rule,
        topology=tf_regtopk.ReduceScatter(capacity=num_replicas, keep=keep),
    )
    workers = reference.ScatteredWorkers(
        name,
        num_replicas,
        SIZES,
        0.3,
        feedback=expected_rule(),
        keep=keep,
    )
    weights = np.zeros(SIZE)
    for t in range(STEPS):
        weights = weights - workers.step(g[t])
        np.testing.assert_allclose(
            actual[t], weights, rtol=1e-9, atol=1e-9, err_msg=f"step {t}"
        )


@pytest.mark.parametrize(
    "values, capacity",
    [
        ("sign", 2.0),
        pytest.param("natural", 1.0, marks=pytest.mark.slow),
        pytest.param("float32", 1.0, marks=pytest.mark.slow),
        pytest.param("natural", 2.0, marks=pytest.mark.slow),
        pytest.param("sign", 1.0, marks=pytest.mark.slow),
    ],
)
def test_weights_and_errors_add_up_to_all_gradients(values, capacity, mirrored):
    """Nothing is lost, at the sender, at the owner, or in the codec."""
    g = gradients(3) / 3
    weights, optimizer, _, _ = train(
        mirrored(3),
        g,
        sparsifier=tf_regtopk.RegTopK(0.2),
        codec=tf_regtopk.Codec(values=values),
        topology=tf_regtopk.ReduceScatter(capacity, keep=1.0),
    )
    np.testing.assert_allclose(
        residual(optimizer) - weights[-1],
        g.sum(axis=(0, 1)),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "rule, place, place_of_all",
    [
        (tf_regtopk.EF21(0.5), 0, 0),
        (tf_regtopk.CompressedDownlink(tf_regtopk.EF21(), density=0.5), 0, 1),
        (tf_regtopk.LocalAdam(tf_regtopk.LearnedShift()), 1, 0),
    ],
)
def test_what_the_codec_rounds_off_is_not_in_h(
    rule, place, place_of_all, mirrored
):
    """Neither in that of all, nor in those of the replicas."""
    _, optimizer, _, _ = train(
        mirrored(2),
        gradients(2)[:3],
        sparsifier=tf_regtopk.TopK(0.3),
        error_feedback=rule,
        codec=tf_regtopk.Codec(values="sign"),
        topology=tf_regtopk.ReduceScatter(),
    )
    saved = optimizer.save_state()
    of_all = saved.shared[place_of_all]
    assert np.count_nonzero(of_all) > 20
    np.testing.assert_allclose(
        sum(parts[place] for parts in saved.replicas.values()),
        of_all,
        atol=1e-6,
    )


def test_without_feedback_what_is_rounded_off_is_lost(mirrored):
    weights, optimizer, *_ = train(
        mirrored(2),
        gradients(2)[:1],
        sparsifier=tf_regtopk.TopK(0.3),
        error_feedback=tf_regtopk.NoFeedback(),
        codec=tf_regtopk.Codec(values="sign"),
        topology=tf_regtopk.ReduceScatter(),
    )
    assert np.any(weights)
    assert set(optimizer.save_state().replicas) == {0, 1}


def test_with_room_for_all_it_is_the_all_gather(mirrored):
    g = gradients(3) / 3
    room = tf_regtopk.ReduceScatter(capacity=3, keep=9)
    sparsifier = tf_regtopk.RegTopK(0.2)
    actual, *_ = train(mirrored(3), g, sparsifier=sparsifier, topology=room)
    expected, *_ = train(mirrored(3), g, sparsifier=sparsifier)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    sparsifier = tf_regtopk.Dense()
    actual, *_ = train(mirrored(3), g, sparsifier=sparsifier, topology=room)
    expected = -g.sum(axis=1).cumsum(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_others_entries_are_what_they_are(mirrored):
    g = gradients(1)
    topology = tf_regtopk.ReduceScatter()
    actual, *_ = train(
        mirrored(0), g, sparsifier=tf_regtopk.RegTopK(0.2), topology=topology
    )
    expected, *_ = train(mirrored(0), g, sparsifier=tf_regtopk.RegTopK(0.2))
    np.testing.assert_array_equal(actual, expected)


def test_a_step_that_is_not_finite_is_skipped_by_all(mirrored):
    g = gradients(3)
    weights, optimizer, take_step, variables = train(
        mirrored(3),
        g,
        sparsifier=tf_regtopk.RegTopK(0.2),
        topology=tf_regtopk.ReduceScatter(),
    )
    errors = optimizer.residual_errors()
    for bad in (np.nan, np.inf, 1e308):
        of_step = g[0].copy()
        of_step[1, 40] = bad
        if bad == 1e308:  # Only the sum is too large.
            of_step[:, 40] = bad
        take_step(of_step)
        np.testing.assert_array_equal(
            flat_gradients.flat_weights(variables), weights[-1]
        )
    assert optimizer.skipped_steps.numpy() == 3
    for before, after in zip(errors, optimizer.residual_errors(), strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
    take_step(g[0])
    assert np.any(flat_gradients.flat_weights(variables) != weights[-1])


def test_a_nan_that_finds_no_room_is_noticed(mirrored):
    """Of too many entries of one owner each may be the one left out."""
    topology = tf_regtopk.ReduceScatter(capacity=1.0)
    optimizer, variables = make(
        mirrored(2), sparsifier=tf_regtopk.TopK(0.1), topology=topology
    )
    take_step = flat_gradients.step_function(mirrored(2), optimizer, variables)
    own = ownership.Ownership(SIZE, 2).entries(1, tf.range(11)).numpy()
    for j in own:
        g = np.zeros((2, SIZE))
        g[0, own] = 1
        g[0, j] = np.nan
        take_step(g)
    assert optimizer.skipped_steps.numpy() == len(own)
    take_step(np.ones((2, SIZE)))
    assert optimizer.skipped_steps.numpy() == len(own)


def test_devices_in_another_order(tmp_path):
    """TensorFlow orders the members of a collective by their names."""
    [result] = multi_worker_launcher.run_workers(
        reversed_devices_program.__file__,
        num_workers=0,
        directory=tmp_path,
        timeout=120,
    )
    assert result["largest_loss"] < 1e-5 < 1 < result["largest_gradient"]


@dataclasses.dataclass(frozen=True)
class WithoutResidual(tf_regtopk.ErrorFeedback):
    """A rule of a user's own that does not say where an error goes."""

    num_local = 0

    def accumulate(self, local, shared, gradient, context):
        return gradient, local

    def update(self, local, indices, sent, total, context):
        return local


def test_a_rule_without_add_error_says_what_to_write(mirrored):
    with pytest.raises(ValueError, match="must define `add_error`"):
        train(
            mirrored(2),
            gradients(2),
            sparsifier=tf_regtopk.TopK(0.2),
            error_feedback=WithoutResidual(),
            topology=tf_regtopk.ReduceScatter(),
        )


@pytest.mark.slow
def test_a_saved_state_goes_on_with_another_number_of_replicas(mirrored):
    kwargs = dict(
        sparsifier=tf_regtopk.RegTopK(0.2),
        error_feedback=tf_regtopk.LearnedShift(),
        topology=tf_regtopk.ReduceScatter(),
    )
    g = gradients(3)
    _, before, go_on, weights = train(mirrored(3), g[:6], **kwargs)
    saved = before.save_state()
    saved_values = [v.numpy() for v in (*weights, *before.variables)]
    saved_residual = residual(before)
    whole = {}
    for t in range(6, STEPS):
        go_on(g[t])
        whole[t] = flat_gradients.flat_weights(weights)
    for n in (3, 2):
        optimizer, variables = make(mirrored(n), **kwargs)
        for variable, old in zip(
            [*variables, *optimizer.variables], saved_values, strict=True
        ):
            variable.assign(old)
        optimizer.load_state(saved)
        np.testing.assert_allclose(
            residual(optimizer), saved_residual, rtol=1e-12, atol=1e-12
        )
        take_step = flat_gradients.step_function(
            mirrored(n), optimizer, variables
        )
        for t in range(6, STEPS):
            take_step(g[t, :n])
            if n == 3:
                np.testing.assert_array_equal(
                    flat_gradients.flat_weights(variables), whole[t]
                )


def test_telemetry_knows_what_was_cancelled(mirrored):
    g = gradients(2)
    g[:, 1] = -0.9 * g[:, 0]
    _, optimizer, _, _ = train(
        mirrored(2),
        g[:1],
        sparsifier=tf_regtopk.TopK(0.2),
        topology=tf_regtopk.ReduceScatter(capacity=2, keep=2),
        telemetry=True,
    )
    [first, _] = optimizer.telemetry()
    np.testing.assert_allclose(first["cancelled"], 18 / 19, rtol=1e-5)


def test_report(mirrored):
    """Bytes both ways, whatever the number of replicas is."""
    sent = []
    for n in (2, 4):
        with mirrored(n).scope():
            variable = keras.Variable(np.zeros(100_000), dtype="float32")
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0),
                tf_regtopk.RegTopK(0.01),
                codec=tf_regtopk.Codec("int32"),
                topology=tf_regtopk.ReduceScatter(capacity=1.5, keep=1.0),
            )
            optimizer.build([variable])
        report = optimizer.wire_report()
        assert report.topology == "ReduceScatter"
        assert report.num_selected == 1000
        # An entry has 8 bytes; the owner's number is a word, the header of what
        # comes back has two, and three follow.
        there, back = -(-1500 // n), 1000 // n
        expected = 8 * (there + back) + 4 * (1 + 2 + 3)
        assert report.payload_bytes == n * expected
        assert report.sent_bytes == (n - 1) * expected
        sent.append(report.sent_bytes / (n - 1) * n)
        assert "ReduceScatter" in str(report)
    np.testing.assert_allclose(*sent, rtol=0.01)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(capacity=0.5), "`capacity` must be at least 1"),
        (dict(keep=0), "`keep` must be positive"),
        (dict(keep=float("nan")), "`keep` must be"),
        (dict(hierarchical=1), "`hierarchical` must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tf_regtopk.ReduceScatter(**kwargs)


def test_lengths_must_be_fixed():
    with pytest.raises(ValueError, match="`codec` must write indices"):
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0),
            codec=tf_regtopk.Codec("golomb"),
            topology=tf_regtopk.ReduceScatter(),
        )


def test_config():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0),
        topology=tf_regtopk.ReduceScatter(capacity=2.0, keep=0.5),
    )
    config = keras.saving.serialize_keras_object(optimizer)
    restored = keras.saving.deserialize_keras_object(config)
    assert restored.topology == optimizer.topology


@keras.saving.register_keras_serializable(package="tests")
@dataclasses.dataclass(frozen=True)
class Doubling(tf_regtopk.ReduceScatter):
    """A topology of a user's own, with one more hyper-parameter."""

    factor: float = 1.0

    def scatter(self, payloads, cluster):
        return super().scatter(payloads, cluster)


@pytest.mark.parametrize(
    "topology, expected",
    [
        # As before there was `hierarchical`.
        (tf_regtopk.ReduceScatter(2.0, 0.5), {"capacity": 2.0, "keep": 0.5}),
        (
            tf_regtopk.ReduceScatter(2.0, hierarchical=True),
            {"capacity": 2.0, "keep": 1.0, "hierarchical": True},
        ),
        (
            Doubling(2.0, 0.5, 3.0),
            {"capacity": 2.0, "keep": 0.5, "factor": 3.0},
        ),
    ],
)
def test_what_is_saved_of_it(topology, expected):
    saved = keras.saving.serialize_keras_object(topology)
    assert saved["config"] == expected
    assert keras.saving.deserialize_keras_object(saved) == topology


def test_the_replicas_of_the_only_worker_are_one(mirrored):
    """Nothing is sent, and entries are what they are."""
    g = gradients(2)
    sparsifier = tf_regtopk.RegTopK(0.2)
    actual, optimizer, *_ = train(
        mirrored(2),
        g,
        sparsifier=sparsifier,
        topology=tf_regtopk.ReduceScatter(hierarchical=True),
    )
    expected, *_ = train(
        mirrored(2), g, sparsifier=sparsifier, hierarchical=True
    )
    np.testing.assert_array_equal(actual, expected)
    assert len(optimizer.residual_errors()) == 1
    assert optimizer.wire_report().sent_bytes == 0


# What each choice of `exchange="auto"` comes to.
CHOICES = {
    "sparse": {"topology": tf_regtopk.ReduceScatter()},
    "all_gather": {},
    "dense": {"exchange": "dense"},
}


def choose(kind, monkeypatch):
    """Makes an exchange the fastest, and returns what is measured."""
    seconds = {name: 0.1 for name in CHOICES} | {kind: 0.05}
    monkeypatch.setattr(auto_exchange, "measure", lambda _: seconds)
    return seconds


def automatic(strategy, **kwargs):
    """An optimizer that chooses, and its variables."""
    return make(
        strategy,
        sparsifier=tf_regtopk.RegTopK(0.2),
        error_feedback=tf_regtopk.LearnedShift(),
        **{
            "exchange": "auto",
            "topology": tf_regtopk.ReduceScatter(),
            **kwargs,
        },
    )


def steps(strategy, optimizer, variables, g):
    """The weights after each step."""
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    weights = []
    for of_step in g:
        take_step(of_step)
        weights.append(flat_gradients.flat_weights(variables))
    return weights


@pytest.mark.parametrize(
    "kind",
    [
        "all_gather",
        pytest.param("sparse", marks=pytest.mark.slow),
        pytest.param("dense", marks=pytest.mark.slow),
    ],
)
def test_auto_takes_the_fastest(kind, mirrored, monkeypatch, capfd):
    seconds = choose(kind, monkeypatch)
    g = gradients(2)[:4]
    capfd.readouterr()
    optimizer, variables = automatic(mirrored(2))
    told = capfd.readouterr().err.splitlines()
    [line] = [line for line in told if line.startswith("INFO:tf_regtopk:")]
    assert line.startswith("INFO:tf_regtopk: Dense") == (kind == "dense")
    assert "Measured a step: sparse " in line
    assert f"{kind} 50.0 ms" in line
    assert optimizer.chosen_exchange == kind
    assert optimizer.exchange_seconds == seconds
    expected, others = automatic(
        mirrored(2), **{"exchange": "sparse", "topology": None, **CHOICES[kind]}
    )
    report, other = optimizer.wire_report(), expected.wire_report()
    assert report == dataclasses.replace(
        other, exchange=kind, exchange_seconds=seconds
    )
    assert f"{kind} (measured a step: sparse " in str(report)
    assert kind in repr(optimizer)
    np.testing.assert_array_equal(
        steps(mirrored(2), optimizer, variables, g),
        steps(mirrored(2), expected, others, g),
    )


def test_auto_measures_all(mirrored):
    optimizer, _ = automatic(mirrored(2))
    seconds = optimizer.exchange_seconds
    assert [*seconds] == [*CHOICES]
    assert all(0 < s < 60 for s in seconds.values())
    assert optimizer.chosen_exchange == auto_exchange.choose(seconds)


@pytest.mark.parametrize(
    "sparse, all_gather, dense, expected",
    [
        (1.0, 1.04, 1.2, "all_gather"),
        (1.0, 1.06, 1.2, "sparse"),
        (1.0, 1.0, 1.04, "dense"),
        (1.0, 1.06, 1.04, "dense"),
        (1.0, 1.02, 1.06, "sparse"),
        (2.0, 1.0, 3.0, "all_gather"),
    ],
)
def test_what_loses_less_is_taken_unless_it_is_slower(
    sparse, all_gather, dense, expected
):
    seconds = {"sparse": sparse, "all_gather": all_gather, "dense": dense}
    assert auto_exchange.choose(seconds) == expected


@pytest.mark.parametrize(
    "saved_with, chosen",
    [
        ("all_gather", "sparse"),
        pytest.param("sparse", "all_gather", marks=pytest.mark.slow),
        pytest.param("all_gather", "dense", marks=pytest.mark.slow),
        pytest.param("dense", "all_gather", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_by_the_exchange_it_began_with(
    saved_with, chosen, mirrored, monkeypatch
):
    """To the bit, also by the exchange's own name."""
    strategy, g = mirrored(2), gradients(2)
    choose(saved_with, monkeypatch)
    optimizer, variables = automatic(strategy)
    steps(strategy, optimizer, variables, g[:4])
    saved = optimizer.save_state()
    kept = [v.numpy() for v in (*variables, *optimizer.variables)]
    expected = steps(strategy, optimizer, variables, g[4:8])
    choose(chosen, monkeypatch)
    own = {"exchange": "sparse", "topology": None, **CHOICES[saved_with]}
    for kwargs in ({}, own):
        optimizer, variables = automatic(strategy, **kwargs)
        assert optimizer.chosen_exchange == kwargs.get("exchange", chosen)
        for variable, value in zip(
            (*variables, *optimizer.variables), kept, strict=True
        ):
            variable.assign(value)
        optimizer.load_state(saved)
        assert optimizer.chosen_exchange == kwargs.get("exchange", saved_with)
        np.testing.assert_array_equal(
            steps(strategy, optimizer, variables, g[4:8]), expected
        )


def test_what_an_all_gather_saved_goes_on_by_the_topology_given(
    mirrored, monkeypatch
):
    choose("all_gather", monkeypatch)
    optimizer, variables = automatic(mirrored(2))
    steps(mirrored(2), optimizer, variables, gradients(2)[:2])
    saved = optimizer.save_state()
    assert saved.moment["exchange"] == "all_gather"
    by_owners, _ = automatic(mirrored(2), exchange="sparse")
    by_owners.load_state(saved)
    assert by_owners.chosen_exchange == "sparse"
    assert by_owners.wire_report().topology == "ReduceScatter"
    choose("dense", monkeypatch)
    gathering, _ = automatic(mirrored(2), topology=None)
    gathering.load_state(saved)
    assert gathering.chosen_exchange == "sparse"
    assert gathering.wire_report().topology == "AllGather"
    np.testing.assert_equal(
        gathering.save_state().replicas, by_owners.save_state().replicas
    )
    dense, _ = automatic(mirrored(2), exchange="dense")
    with pytest.raises(ValueError, match='must be "auto" or "sparse"'):
        dense.load_state(saved)


def test_a_backup_of_an_all_gather_goes_on_by_the_topology_given(
    mirrored, monkeypatch, tmp_path
):
    def build(**kwargs):
        with mirrored(2).scope():
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            model.compile(
                tf_regtopk.SparsifiedOptimizer(
                    keras.optimizers.SGD(0.1), **kwargs
                ),
                loss="mse",
            )
            model.optimizer.build(model.trainable_variables)
        return model

    choose("all_gather", monkeypatch)
    model = build(topology=tf_regtopk.ReduceScatter(), exchange="auto")
    backup = tf_regtopk.Backup(tmp_path)
    assert backup.restore(model) == 0
    model.fit(tf.ones([4, 3]), tf.ones([4, 2]), verbose=0, callbacks=[backup])
    for topology in (tf_regtopk.AllGather(), tf_regtopk.ReduceScatter()):
        other = build(topology=topology)
        assert tf_regtopk.Backup(tmp_path).restore(other) == 1
        assert other.optimizer.chosen_exchange == "sparse"
        np.testing.assert_equal(
            other.optimizer.residual_errors(), model.optimizer.residual_errors()
        )
