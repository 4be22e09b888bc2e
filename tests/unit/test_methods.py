"""The published methods against the NumPy reference."""

import functools

import flat_gradients
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import tf_regtopk
from tf_regtopk import methods

SHAPES = [(5, 7), (9,)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]

# Each with the arguments of the reference, and the learning rate 0.25.
METHODS = {
    "dgc": (
        lambda: methods.deep_gradient_compression(0.25, 0.7, 0.2),
        dict(feedback=lambda: reference.Accumulate(0.7, factor_masking=True)),
    ),
    "dgc, clipped": (
        lambda: methods.deep_gradient_compression(
            0.25, 0.7, 0.2, clip_norm=2.0
        ),
        dict(feedback=lambda: reference.Accumulate(0.7, True, 2.0)),
    ),
    "ef21": (
        lambda: methods.ef21_sgdm(0.25, 0.3, 0.2),
        dict(feedback=lambda: reference.EF21(0.3)),
    ),
    "stc": (
        lambda: methods.sparse_ternary_compression(
            0.25, 0.2, downlink_density=0.1
        ),
        dict(
            feedback=lambda: reference.CompressedDownlink(density=0.1),
            values="ternary",
        ),
    ),
    "recommended": (
        lambda: methods.recommended(
            keras.optimizers.SGD(0.25, momentum=0.7), compression=40
        ),
        dict(
            feedback=lambda: reference.LearnedShift(momentum=0.7, at_once=True),
            density=0.136,
            # Signs, of which so few share one magnitude.
            values="ternary",
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "dgc, clipped",
        "ef21",
        "stc",
        "recommended",
        pytest.param("dgc", marks=pytest.mark.slow),
    ],
)
def test_weights_follow_the_reference(name, mirrored):
    make, arguments = METHODS[name]
    strategy = mirrored(2)
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float64") for shape in SHAPES
        ]
        optimizer = make()
    step = flat_gradients.step_function(strategy, optimizer, variables)
    arguments = {
        "density": 0.2,
        **arguments,
        "feedback": arguments["feedback"](),
    }
    kind = "regtopk" if name == "recommended" else "topk"
    workers = reference.Workers(kind, 2, SIZES, **arguments)
    weights = np.zeros(sum(SIZES))
    rng = np.random.default_rng(0)
    for t in range(10):
        gradients = rng.standard_normal((2, sum(SIZES)))
        step(gradients / 2)
        weights = weights - 0.25 * workers.step(gradients, 0.25)
        np.testing.assert_allclose(
            flat_gradients.flat_weights(variables),
            weights,
            # The magnitude of values of one bit is computed in float32.
            atol=1e-5 if arguments.get("values") else 1e-9,
            err_msg=f"step {t}",
        )


def test_other_arguments_and_optimizers():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    made = methods.ef21_sgdm(schedule, scope="per_variable", dense_below=7)
    assert made.scope == "per_variable" and made.dense_below == 7
    assert type(made.inner_optimizer) is keras.optimizers.SGD
    assert float(made.learning_rate) == np.float32(0.1)
    inner = keras.optimizers.RMSprop(0.1)
    made = methods.deep_gradient_compression(inner, clip_norm=1.0)
    assert made.inner_optimizer is inner
    # Without momentum of the method the optimizer may have its own.
    made = methods.deep_gradient_compression(keras.optimizers.Adam(), 0.0)
    assert made.error_feedback == tf_regtopk.Accumulate()
    made = methods.sparse_ternary_compression(keras.optimizers.SGD(0.1, 0.9))
    assert made.inner_optimizer.momentum == 0.9
    again = keras.optimizers.deserialize(keras.optimizers.serialize(made))
    assert again.get_config() == made.get_config()


@pytest.mark.parametrize(
    "method", [methods.deep_gradient_compression, methods.ef21_sgdm]
)
@pytest.mark.parametrize(
    "make", [lambda: keras.optimizers.SGD(0.1, 0.5), keras.optimizers.Lion]
)
def test_momentum_is_not_applied_twice(method, make):
    with pytest.raises(ValueError, match="`inner` must have no momentum.*Rec"):
        method(make())


@pytest.mark.parametrize("compression", [40, 100, 300, 732, 5000])
@pytest.mark.parametrize("size", [1_000_000, 25_557_032])
def test_recommended_sends_the_bytes_asked_for(compression, size):
    made = methods.recommended(0.1, compression=compression)
    k = made.sparsifier.num_selected(size)
    payload = made.codec.payload(k, size).num_words
    # A density of three digits, and some words of a payload's ends.
    assert payload == pytest.approx(size / compression, rel=0.03)


def test_recommended_moves_momentum():
    made = methods.recommended(0.1)
    assert made.error_feedback == tf_regtopk.LearnedShift(
        momentum=0.9, at_once=True
    )
    assert made.inner_optimizer.momentum == 0

    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    inner = keras.optimizers.SGD(schedule, momentum=0.6, weight_decay=1e-4)
    config = inner.get_config()
    made = methods.recommended(inner)
    assert made.error_feedback == tf_regtopk.LearnedShift(
        momentum=0.6, at_once=True
    )
    assert made.inner_optimizer is inner
    assert inner.get_config() == {**config, "momentum": 0.0}

    # The momentum of others stays where it is.
    for inner in (
        keras.optimizers.Lion(0.01),
        keras.optimizers.Adam(amsgrad=True),
    ):
        made = methods.recommended(inner, dense_below=7)
        assert made.error_feedback == tf_regtopk.LearnedShift(at_once=True)
        assert made.inner_optimizer is inner and made.dense_below == 7


@pytest.mark.parametrize(
    "arguments",
    [dict(exchange="dense"), dict(dense=["*"]), dict(dense_below=9)],
)
@pytest.mark.parametrize("clipnorm", [None, 2.0])
def test_adam_is_keras_adam_where_all_entries_are_sent(arguments, clipnorm):
    def train(optimizer):
        variables = [keras.Variable(np.ones(n, np.float32)) for n in (3, 5)]
        optimizer.build(variables)
        rng = np.random.default_rng(0)
        for _ in range(6):
            gradients = [rng.standard_normal(v.shape) for v in variables]
            optimizer.apply(
                [tf.constant(g, tf.float32) for g in gradients], variables
            )
        return np.concatenate([np.array(v) for v in variables])

    def make():
        return keras.optimizers.AdamW(
            0.125,
            beta_1=0.8,
            beta_2=0.9,
            weight_decay=0.25,
            clipnorm=clipnorm,
        )

    np.testing.assert_allclose(
        train(methods.recommended(make(), **arguments)),
        train(make()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_recommended_moves_adam(name):
    inner = getattr(keras.optimizers, name)(
        0.01,
        beta_1=0.8,
        beta_2=0.99,
        weight_decay=0.1,
        epsilon=1e-3,
        clipnorm=2.0,
        use_ema=True,
    )
    made = methods.recommended(inner)
    assert made.error_feedback == tf_regtopk.LocalAdam(
        tf_regtopk.LearnedShift(), beta_1=0.8, beta_2=0.99, dense_epsilon=1e-3
    )
    assert made.get_config()["clipping"] == "replica"
    sgd = made.inner_optimizer
    assert type(sgd) is keras.optimizers.SGD and sgd.momentum == 0
    config, expected = sgd.get_config(), inner.get_config()
    left = {"momentum", "nesterov"}
    assert config.keys() - left < expected.keys()
    for key in config.keys() - left:
        assert config[key] == expected[key], key
    again = keras.optimizers.deserialize(keras.optimizers.serialize(made))
    assert again.get_config() == made.get_config()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(keras.optimizers.SGD, momentum=0.9),
        keras.optimizers.AdamW,
    ],
)
def test_recommended_keeps_what_a_configuration_lacks(make):
    """Variables that are excluded from weight decay, and a function as rate."""
    inner = make(lambda: 0.5, weight_decay=0.5)
    inner.exclude_from_weight_decay(var_names=["bias"])
    made = methods.recommended(inner, compression=40)
    bias, kernel = (
        keras.Variable(np.ones(100, np.float32), name=name)
        for name in ("bias", "kernel")
    )
    made.build([bias, kernel])
    made.apply([tf.zeros(100), tf.zeros(100)], [bias, kernel])
    np.testing.assert_array_equal(bias, np.ones(100))
    np.testing.assert_array_equal(kernel, 0.75 * np.ones(100))


@pytest.mark.parametrize(
    "clipping", ["clipnorm", "clipvalue", "global_clipnorm"]
)
def test_recommended_clips_before_momentum(clipping):
    """As plain Keras does: else the momentum would be clipped as well."""

    def train(optimizer):
        variable = keras.Variable(np.zeros(50, np.float32))
        optimizer.build([variable])
        rng = np.random.default_rng(0)
        for _ in range(4):
            gradient = rng.standard_normal(50).astype(np.float32)
            optimizer.apply([tf.constant(gradient)], [variable])
        return np.array(variable)

    def make():
        return keras.optimizers.SGD(0.25, momentum=0.5, **{clipping: 0.5})

    whole = train(methods.recommended(make(), exchange="dense"))
    np.testing.assert_allclose(whole, train(make()), rtol=1e-5, atol=1e-7)
    made = methods.recommended(make(), compression=40)
    assert made.get_config()["clipping"] == "replica"


def test_clipping_after_momentum_is_warned_of():
    inner = keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=1.0)
    with pytest.warns(UserWarning, match="after the momentum of.*Received"):
        made = methods.recommended(inner, clipping="aggregate")
    assert made.get_config()["clipping"] == "aggregate"


def test_recommended_moves_no_momentum_after_an_error():
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    with pytest.raises(ValueError, match="dense_below"):
        methods.recommended(inner, dense_below=-1)
    assert inner.momentum == 0.9
    made = methods.recommended(inner)
    assert made.error_feedback.momentum == 0.9
    # The second time there would be no momentum left.
    with pytest.raises(ValueError, match="`inner` must be a new optimizer"):
        methods.recommended(inner)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [keras.optimizers.SGD(0.1, 0.5), 0.9],
            "`inner` must have no mom.*Rec",
        ),
        ([keras.optimizers.Adam(), 0.9], "`momentum` must be left out.*Rec"),
        (
            [keras.optimizers.Adam(), 1.5],
            r"`momentum` must be in \[0, 1\). Rec",
        ),
        ([keras.optimizers.SGD(0.1, 0.9, nesterov=True)], "`nesterov=True`.*R"),
        ([0.1, 1.0], "`momentum` must be"),
        ([0.1, 0.9, 10], "`compression` must be at least 40. Received: comp"),
    ],
)
def test_recommended_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.recommended(*arguments)


@pytest.mark.parametrize("inner", ["adam", [0.1], None, keras.optimizers.Adam])
def test_a_learning_rate_is_a_number(inner):
    for method in (methods.recommended, methods.ef21_sgdm):
        with pytest.raises(TypeError, match="`inner` must be a learning rate"):
            method(inner)


def test_recommended_takes_an_epsilon_of_0():
    made = methods.recommended(keras.optimizers.Adam(epsilon=0.0))
    assert made.error_feedback.dense_epsilon == 0


def test_recommended_names_the_option_that_it_chooses():
    with pytest.raises(TypeError, match="`codec` must be left out.*Received"):
        methods.recommended(0.1, codec=tf_regtopk.Codec())


def test_recommended_tells_what_it_leaves_after_the_sum(caplog):
    for inner in (
        keras.optimizers.SGD(0.1),
        keras.optimizers.Adam(),
    ):
        methods.recommended(inner)
    # Asked for.
    methods.recommended(keras.optimizers.Adam(), momentum=0)
    assert not caplog.records
    for inner in (
        keras.optimizers.Adam(amsgrad=True),
        keras.optimizers.RMSprop(),
    ):
        made = methods.recommended(inner)
        assert made.inner_optimizer is inner
        [record] = caplog.records
        assert f"{type(inner).__name__} acts after the sum" in record.message
        caplog.clear()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_recommended_refuses_a_built_optimizer(name):
    inner = getattr(keras.optimizers, name)(0.1)
    if name == "SGD":
        inner.momentum = 0.9
    inner.build([keras.Variable([0.0])])
    with pytest.raises(ValueError, match=f"not be built.*a new.*{name}`. Rec"):
        methods.recommended(inner)
