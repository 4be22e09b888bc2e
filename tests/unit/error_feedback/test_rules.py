"""The rules of error feedback against the NumPy reference."""

import flat_gradients
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import error_feedback

SHAPES = [(3, 5), (7,), (12, 7)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
SIZE = sum(SIZES)
STEPS = 12

RULES = {
    "accumulate": ("Accumulate", {}),
    "local momentum": ("Accumulate", dict(momentum=0.7)),
    "dgc": ("Accumulate", dict(momentum=0.7, factor_masking=True)),
    "clipped": ("Accumulate", dict(momentum=0.5, clip_norm=2.0)),
    "follows": ("Accumulate", dict(follow_learning_rate=True)),
    "none": ("NoFeedback", {}),
    "ef21": ("EF21", {}),
    "ef21-sgdm": ("EF21", dict(momentum=0.3)),
    "shift": ("LearnedShift", {}),
    "shift, rate": ("LearnedShift", dict(rate=0.5)),
    "shift, momentum": ("LearnedShift", dict(momentum=0.6)),
    "shift, masked": (
        "LearnedShift",
        dict(momentum=0.6, factor_masking=True),
    ),
    "downlink": ("CompressedDownlink", dict(density=0.15)),
    "downlink of ef21": (
        "CompressedDownlink",
        dict(error_feedback="ef21", values="float32"),
    ),
    "shift, at once": ("LearnedShift", dict(momentum=0.6, at_once=True)),
    "local adam": ("LocalAdam", dict(beta_2=0.9)),
    "local adam, shift": (
        "LocalAdam",
        dict(error_feedback="shift", beta_1=0.0, epsilon=0.03),
    ),
    "downlink, follows": (
        "CompressedDownlink",
        dict(error_feedback="follows", density=0.4, values="float32"),
    ),
}


def rule_of(module, name):
    class_name, arguments = RULES[name]
    if "error_feedback" in arguments:
        inner = rule_of(module, arguments["error_feedback"])
        arguments = {**arguments, "error_feedback": inner}
        if module is tf_regtopk and "values" in arguments:
            arguments["codec"] = tf_regtopk.Codec(
                values=arguments.pop("values")
            )
    return getattr(module, class_name)(**arguments)


def make(strategy, name, sparsifier):
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float64") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.5),
            sparsifier,
            error_feedback=rule_of(tf_regtopk, name),
        )
        optimizer.build(variables)

    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    return optimizer, variables, take_step


def gradients_of(num_replicas):
    rng = np.random.default_rng(num_replicas)
    own = rng.standard_normal((STEPS, num_replicas, SIZE))
    bias = 2 * rng.standard_normal((1, num_replicas, SIZE))
    return own + bias - bias.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("name", RULES)
def test_weights_follow_the_reference(name, mirrored):
    case = list(RULES).index(name)
    num_replicas = 3 if case % 3 == 2 else 2
    method = ["topk", "regtopk"][case // 2 % 2]
    sparsifier = {
        "topk": tf_regtopk.TopK(0.2),
        "regtopk": tf_regtopk.RegTopK(0.2, mu=1.5),
    }[method]
    optimizer, variables, take_step = make(
        mirrored(num_replicas), name, sparsifier
    )
    workers = reference.Workers(
        method,
        num_replicas,
        SIZES,
        0.2,
        mu=1.5,
        feedback=rule_of(reference, name),
    )
    weights = np.zeros(SIZE)
    for t, g in enumerate(gradients_of(num_replicas)):
        rate = 0.5 if t < 5 else 0.125
        optimizer.learning_rate = rate
        take_step(g / num_replicas)
        weights = weights - rate * workers.step(g, rate)
        np.testing.assert_allclose(
            flat_gradients.flat_weights(variables),
            weights,
            # The magnitude of ternary values is computed in float32.
            atol=1e-6 if name == "downlink" else 1e-9,
            err_msg=f"step {t}",
        )


def test_the_rules_differ_on_these_gradients():
    """The comparison above could tell one from another."""
    totals = []
    for name in RULES:
        workers = reference.Workers(
            "topk", 3, SIZES, 0.2, feedback=rule_of(reference, name)
        )
        rates = [0.5] * 5 + [0.125] * (STEPS - 5)
        totals.append(
            sum(
                workers.step(g, rate)
                for g, rate in zip(gradients_of(3), rates, strict=True)
            )
        )
    for i, total in enumerate(totals):
        for other in totals[:i]:
            assert not np.allclose(total, other)


@pytest.mark.parametrize(
    "name, momentum", [("shift", 0.0), ("shift, momentum", 0.6)]
)
def test_shift_at_density_one_is_the_optimizer_itself(name, momentum, mirrored):
    _, variables, take_step = make(mirrored(2), name, tf_regtopk.TopK(1.0))
    weights, velocity = np.zeros(SIZE), np.zeros(SIZE)
    for g in gradients_of(2):
        take_step(g / 2)
        velocity = momentum * velocity + g.mean(axis=0)
        weights -= 0.5 * velocity
        np.testing.assert_allclose(
            flat_gradients.flat_weights(variables), weights, atol=1e-9
        )


def test_shift_loses_nothing(mirrored):
    """The aggregates of all steps and the errors add up to all gradients."""
    optimizer, variables, take_step = make(
        mirrored(3), "shift", tf_regtopk.RegTopK(0.1)
    )
    gradients = gradients_of(3) / 3
    for g in gradients:
        take_step(g)
    replicas = optimizer.save_state().replicas
    errors = sum(parts[0] for parts in replicas.values())
    applied = -flat_gradients.flat_weights(variables) / 0.5
    # Each step applied H, and each replica took its own h off its gradient.
    np.testing.assert_allclose(
        applied + errors, gradients.sum(axis=(0, 1)), atol=1e-9
    )


@pytest.mark.parametrize(
    "name",
    [
        "dgc",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "downlink of ef21",
                "ef21-sgdm",
                "shift, momentum",
                "none",
            )
        ),
    ],
)
def test_state_is_saved_and_fits_another_world(name, mirrored):
    """To the bit on as many replicas, and with the same sums on others."""
    gradients = gradients_of(2) / 2

    def start():
        return make(mirrored(2), name, tf_regtopk.RegTopK(0.2, mu=1.5))

    optimizer, variables, take_step = start()
    for g in gradients[:5]:
        take_step(g)
    store = {}
    optimizer.save_own_variables(store)
    weights = [v.numpy() for v in variables]
    again, variables_again, take_step_again = start()
    again.load_own_variables(store)
    for variable, value in zip(variables_again, weights, strict=True):
        variable.assign(value)
    for g in gradients[5:]:
        take_step(g)
        take_step_again(g)
    assert flat_gradients.flat_weights(variables).tobytes() == (
        flat_gradients.flat_weights(variables_again).tobytes()
    )

    alone, _, _ = make(mirrored(0), name, tf_regtopk.RegTopK(0.2, mu=1.5))
    rule = alone.error_feedback
    saved = optimizer.save_state()
    with pytest.warns(UserWarning, match="Saved by 2 replicas"):
        alone.load_state(saved)
    assert np.isnan(alone.save_state().replicas[0][-1]).all()
    loaded = alone.save_state()
    [parts] = loaded.replicas.values()
    both = [saved.replicas[n] for n in range(2)]
    for i in range(rule.num_local):
        np.testing.assert_allclose(
            parts[i], both[0][i] + both[1][i], atol=1e-12
        )
    num_shared = len(rule.initial_shared(SIZE, tf.float64))
    assert len(saved.shared) == num_shared
    np.testing.assert_array_equal(loaded.shared, saved.shared)
    for arrays in optimizer._partition.feedback_state.local_arrays():
        for i, array in enumerate(saved.shared):
            assert array.tobytes() == arrays[rule.num_local + i].tobytes()
    # Of two workers one's file alone.
    part = saved._replace(replicas={0: saved.replicas[0]})
    if num_shared:
        with pytest.raises(ValueError, match=r"none of the replicas \[1\]"):
            again.load_state(part)
    other_rule, _, _ = make(
        mirrored(2), "accumulate", tf_regtopk.RegTopK(0.2, mu=1.5)
    )
    with pytest.raises(ValueError, match="error_feedback="):
        other_rule.load_state(saved)


@pytest.mark.parametrize("name", ["dgc", "ef21-sgdm", "shift, momentum"])
def test_steps_that_are_not_finite_change_nothing(name, mirrored):
    optimizer, variables, take_step = make(
        mirrored(2), name, tf_regtopk.TopK(0.2)
    )
    gradients = gradients_of(2)
    take_step(gradients[0])

    def everything():
        saved = optimizer.save_state()
        parts = [*saved.replicas[0], *saved.replicas[1], *saved.shared]
        return [flat_gradients.flat_weights(variables).tobytes()] + [
            part.tobytes() for part in parts
        ]

    before = everything()
    bad = gradients[1].copy()
    bad[1, 33] = np.nan
    take_step(bad)
    assert everything() == before
    assert optimizer.skipped_steps.numpy() == 1
    take_step(gradients[1])
    assert everything() != before


@pytest.mark.parametrize(
    "name, values",
    [
        ("follows", "float32"),
        ("dgc", "float32"),
        ("ef21-sgdm", "ternary"),
        ("shift, momentum", "float32"),
        *(
            pytest.param(name, values, marks=pytest.mark.slow)
            for name, values in (
                ("dgc", "ternary"),
                ("ef21-sgdm", "float32"),
                ("shift, momentum", "ternary"),
            )
        ),
    ],
)
def test_state_of_a_variable_without_gradient_is_kept(name, values):
    """Even where entries of it are selected, and decode to something else."""
    variables = [keras.Variable(np.zeros(9)), keras.Variable(np.zeros(7))]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.5),
        tf_regtopk.TopK(0.5),
        error_feedback=rule_of(tf_regtopk, name),
        codec=tf_regtopk.Codec(values=values),
        scope="per_variable",
    )
    rng = np.random.default_rng(0)
    rule = optimizer.error_feedback
    optimizer.build(variables)

    def state():
        saved = optimizer.save_state()
        [parts] = saved.replicas.values()
        parts = [*parts, *saved.shared]
        return [part[9:].copy() for part in parts if part.shape == (16,)]

    for _ in range(3):
        optimizer.apply(
            [tf.constant(rng.standard_normal(n), "float32") for n in (9, 7)],
            variables,
        )
    before, weights = state(), variables[1].numpy()
    shared = rule.initial_shared(16, tf.float32)
    vectors = [part for part in shared if part.shape == [16]]
    assert len(before) == rule.num_local + len(vectors)
    assert all(part.any() for part in before)
    optimizer.learning_rate = 0.125
    for _ in range(3):
        optimizer.apply(
            [tf.constant(rng.standard_normal(9), "float32"), None], variables
        )
    for old, new in zip(before, state(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(weights, variables[1].numpy())


@pytest.mark.parametrize("name", RULES)
def test_rules_are_saved_with_the_optimizer(name):
    rule = rule_of(tf_regtopk, name)
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), error_feedback=rule
    )
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.error_feedback == rule


def test_numbers_of_any_type_are_stored_plainly():
    rule = tf_regtopk.EF21(momentum=np.float32(0.5))
    assert type(rule.momentum) is float
    codec = tf_regtopk.Uniform(num_bits=np.int64(3))
    assert type(codec.num_bits) is int


def test_huge_gradients_are_clipped_as_well():
    rule = tf_regtopk.Accumulate(clip_norm=2.0)
    context = error_feedback.StepContext(4, 0.1, tf.zeros([]), tf.constant(0))
    g = tf.constant([3e30, -4e30, 0.0])
    a, _ = rule.accumulate((tf.zeros([3]),), (), g, context)
    np.testing.assert_allclose(a, [0.6, -0.8, 0.0], rtol=1e-6)
    a, _ = rule.accumulate((tf.zeros([3]),), (), tf.zeros([3]), context)
    assert not a.numpy().any()


def test_squares_that_overflow_skip_the_step():
    """Else the mean would be infinite, and nothing be sent any more."""
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.5), error_feedback=tf_regtopk.LocalAdam()
    )
    variable = keras.Variable(np.zeros(3, np.float32))
    for value, skipped in ((1e25, 1), (2.0, 1)):
        optimizer.apply([tf.constant([value, 1.0, 0.0])], [variable])
        assert optimizer.skipped_steps.numpy() == skipped
    x = np.array([2.0, 1.0, 0.0])
    x /= x + 0.1 * np.sqrt(np.mean(x**2)) + [0, 0, 1]
    np.testing.assert_allclose(variable, -0.5 * x, rtol=1e-6)


def test_mean_squares_keep_their_meaning_with_fewer_replicas(mirrored):
    """A replica of two has twice the weight in the loss of one of four."""
    g = np.random.default_rng(0).standard_normal(SIZE)
    means = {}
    for n in (4, 2):
        optimizer, _, take_step = make(
            mirrored(n), "local adam", tf_regtopk.TopK(0.2)
        )
        for _ in range(3):
            take_step(np.tile(g / n, [n, 1]))
        means[n] = {i: p[1] for i, p in optimizer.save_state().replicas.items()}
    total = sum(means[4].values())
    for mean in means[2].values():
        np.testing.assert_allclose(mean, total / 2, rtol=1e-6)


@pytest.mark.parametrize("before, now", [(0, 0.1), (0.1, 0), (0, 0)])
def test_errors_do_not_follow_a_learning_rate_of_0(before, now):
    rule = tf_regtopk.Accumulate(follow_learning_rate=True)
    context = error_feedback.StepContext(
        1, 1.0, tf.constant(now, "float32"), tf.constant(0)
    )
    e = tf.constant([3.0])
    shared = (tf.constant(before, "float32"),)
    a, _ = rule.accumulate((e,), shared, tf.zeros([1]), context)
    assert a.numpy() == [3.0]


@pytest.mark.parametrize(
    "make_rule, error, message",
    [
        (
            lambda: tf_regtopk.Accumulate(momentum=1.0),
            ValueError,
            r"`momentum` must be in \[0, 1\). Received: momentum=1.0",
        ),
        (
            lambda: tf_regtopk.Accumulate(factor_masking=1),
            TypeError,
            "`factor_masking` must be a boolean. Received: factor_masking=1",
        ),
        (
            lambda: tf_regtopk.Accumulate(factor_masking=True),
            ValueError,
            "`factor_masking` must go with `momentum`.* Received: .*momentum=0",
        ),
        (
            lambda: tf_regtopk.Accumulate(clip_norm=0),
            ValueError,
            "`clip_norm` must be positive, and at .*Received: clip_norm=0",
        ),
        (
            lambda: tf_regtopk.EF21(momentum=0),
            ValueError,
            r"`momentum` must be in \(0, 1\]. Received: momentum=0",
        ),
        (
            lambda: tf_regtopk.EF21(momentum=1.5),
            ValueError,
            r"`momentum` must be in \(0, 1\]. Received: momentum=1.5",
        ),
        (
            lambda: tf_regtopk.LearnedShift(rate=0),
            ValueError,
            r"`rate` must be in \(0, 1\]. Received: rate=0",
        ),
        (
            lambda: tf_regtopk.LearnedShift(rate=1.5),
            ValueError,
            r"`rate` must be in \(0, 1\]. Received: rate=1.5",
        ),
        (
            lambda: tf_regtopk.LearnedShift(momentum=1.0),
            ValueError,
            r"`momentum` must be in \[0, 1\). Received: momentum=1.0",
        ),
        (
            lambda: tf_regtopk.LearnedShift(factor_masking=True),
            ValueError,
            "`factor_masking` must go with `momentum`.* Received: .*momentum=0",
        ),
        (
            lambda: tf_regtopk.LearnedShift(
                momentum=0.5, factor_masking=True, at_once=True
            ),
            ValueError,
            "`factor_masking` must be False.* Received: .*at_once=True",
        ),
        (
            lambda: tf_regtopk.LearnedShift(momentum=0.5, at_once="no"),
            TypeError,
            "`at_once` must be .* Received: at_once='no'",
        ),
        (
            lambda: tf_regtopk.CompressedDownlink(0.5),
            TypeError,
            "`error_feedback` must be .* Received: error_feedback=0.5",
        ),
        (
            lambda: tf_regtopk.CompressedDownlink(density=0),
            ValueError,
            r"`density` must be in \(0, 1\]. Received: density=0",
        ),
        (
            lambda: tf_regtopk.CompressedDownlink(codec="ternary"),
            TypeError,
            "`codec` must be .* Received: codec='ternary'",
        ),
    ],
)
def test_bad_arguments(make_rule, error, message):
    with pytest.raises(error, match=message):
        make_rule()


def test_a_downlink_rounds_unlike_any_replica():
    codec, total = tf_regtopk.Codec(values="natural"), tf.range(1.0, 200.0)
    rule = tf_regtopk.CompressedDownlink(density=1.0, codec=codec)
    context = error_feedback.StepContext(3, 1.0, tf.zeros([]), tf.constant(5))
    sums, _ = rule.aggregate((tf.zeros_like(total),), total, context)
    payload = codec.payload(199, 199)
    for rank in range(3):
        _, sent = payload.encode(
            tf.range(199), total, (context.number, tf.constant(rank))
        )
        assert np.any(sums != sent)


def test_the_scale_of_a_momentum_of_0():
    rule = error_feedback.MomentumOfSum(0.0, scale=0.5, clip_norm=1.0)
    context = error_feedback.StepContext(1, 1.0, tf.zeros([]), tf.constant(0))
    aggregate, shared = rule.aggregate((), tf.constant([2.0]), context)
    assert aggregate.numpy().tolist() == [1.0] and shared == ()
