"""Cross gradients under `fit`: NGC and CompNGC."""

import contextlib

import decentralized_program
import gossip_reference
import keras
import numpy as np
import pytest
import small_models

import tf_regtopk

RING = tf_regtopk.Ring()
COMPLETE = tf_regtopk.Complete()
SIGN = tf_regtopk.Codec(values="sign")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@keras.saving.register_keras_serializable(package="tests")
class Network(tf_regtopk.CrossGradientTraining, keras.Sequential):
    """A model with cross gradients."""


def train(
    strategy,
    layers,
    data,
    cross_gradients,
    topology=RING,
    kind=Network,
    learning_rate=0.1,
    momentum=0.9,
    loss=LOSS,
    for_compile=None,
    **kwargs,
):
    """A model after `fit`, and the logs.

    Args:
        strategy: The strategy.
        layers: Function that returns a list of layers.
        data: `(x, y)` or `(x, y, weights)`, of which each step takes
            `batch_size`, the replicas one part after the other.
        cross_gradients: As of the optimizer.
        topology: As of the optimizer.
        kind: Class of the model.
        learning_rate: As of `keras.optimizers.SGD`.
        momentum: As of `keras.optimizers.SGD`.
        loss: As of `compile`.
        for_compile: Further arguments of `compile`.
        **kwargs: Further arguments of `fit`.
    """
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = kind(layers())
        model.compile(
            tf_regtopk.DecentralizedOptimizer(
                keras.optimizers.SGD(learning_rate, momentum=momentum),
                topology,
                cross_gradients=cross_gradients,
                average_at_end=False,
            ),
            loss=loss,
            weighted_metrics=["accuracy"],
            **(for_compile or {}),
        )
    history = model.fit(*data, shuffle=False, verbose=0, **kwargs)
    return model, history.history


def local_weights(strategy, model):
    """`[N, J]`, the trainable weights of the replicas."""
    return np.stack(
        decentralized_program.local_weights(strategy, model.trainable_variables)
    )


def softmax_data(n, num_steps=6, batch=5, features=7, classes=3):
    """Data of which each replica has a class more often than the others."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((num_steps, n, batch, features))
    y = rng.integers(classes, size=(num_steps, n, batch))
    y[..., :3] = np.arange(n)[:, np.newaxis] % classes
    return x.astype("float32"), y


def gradient_of_softmax(weights, x, y, classes=3):
    """By hand, of the mean cross entropy, with weights `[J]`: kernel, bias."""
    kernel, bias = np.split(weights, [x.shape[1] * classes])
    z = x @ kernel.reshape(-1, classes) + bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(classes)[y]) / len(y)
    return np.concatenate([(x.T @ error).ravel(), error.sum(axis=0)])


def softmax_layers():
    return [keras.Input([7]), keras.layers.Dense(3)]


@pytest.mark.parametrize(
    "topology, cross_gradients, compress",
    [
        (RING, tf_regtopk.CrossGradients(alpha=0.0), None),
        (RING, tf_regtopk.CrossGradients(alpha=0.5), None),
        pytest.param(
            *(RING, tf_regtopk.CrossGradients(alpha=1.0), None),
            marks=pytest.mark.slow,
        ),
        (
            RING,
            tf_regtopk.CrossGradients(0.75, SIGN),
            gossip_reference.scaled_signs,
        ),
        # Errors of two neighbours, of which one is met in each step.
        (
            tf_regtopk.OnePeerExponential(),
            tf_regtopk.CrossGradients(1.0, SIGN),
            gossip_reference.scaled_signs,
        ),
        pytest.param(
            RING,
            tf_regtopk.CrossGradients(1.0, SIGN, tf_regtopk.NoFeedback()),
            gossip_reference.scaled_signs,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equals_the_paper(topology, cross_gradients, compress, mirrored):
    n, lr, momentum = 4, 0.1, 0.9
    x, y = softmax_data(n)
    strategy = mirrored(n)
    model, _ = train(
        strategy,
        softmax_layers,
        (x.reshape(-1, x.shape[-1]), y.ravel()),
        cross_gradients,
        topology,
        batch_size=y[0].size,
    )
    # Of the same seed.
    keras.utils.set_random_seed(1)
    start = keras.Sequential(softmax_layers()).get_weights()
    start = np.concatenate([w.ravel() for w in start]).astype(float)
    twin = gossip_reference.NGC(
        np.tile(start, (n, 1)),
        cross_gradients.alpha,
        compress,
        cross_gradients.error_feedback != tf_regtopk.NoFeedback(),
    )
    matrices = topology.mixing_matrices(n)
    velocity = np.zeros_like(twin.x)
    for t in range(len(x)):
        w = matrices[t % len(matrices)]
        g = twin.gradients(
            w,
            lambda i, weights, t=t: gradient_of_softmax(
                weights, x[t, i].astype(float), y[t, i]
            ),
        )
        velocity = momentum * velocity - lr * g
        twin.step(w, velocity)
    np.testing.assert_allclose(
        local_weights(strategy, model), twin.x, atol=1e-5
    )
    assert gossip_reference.disagreement(twin.x) > 0.02


def test_one_step_from_the_same_weights_takes_the_mean(mirrored):
    """With all others as neighbours; each alone has a gradient far from it."""
    n, lr = 4, 0.5
    x, y = softmax_data(n, num_steps=1)
    data = (x.reshape(-1, x.shape[-1]), y.ravel())
    found = {}
    for name, cross_gradients, kind in (
        ("cross", tf_regtopk.CrossGradients(), Network),
        ("plain", None, keras.Sequential),
    ):
        model, _ = train(
            mirrored(n),
            softmax_layers,
            data,
            cross_gradients,
            COMPLETE,
            kind,
            learning_rate=lr,
            momentum=0.0,
            batch_size=len(data[1]),
        )
        found[name] = local_weights(mirrored(n), model)
    keras.utils.set_random_seed(1)
    start = keras.Sequential(softmax_layers()).get_weights()
    start = np.concatenate([w.ravel() for w in start]).astype(float)
    g = [gradient_of_softmax(start, x[0, i], y[0, i]) for i in range(n)]
    expected = start - lr * np.mean(g, axis=0)
    np.testing.assert_allclose(found["cross"], [expected] * n, atol=1e-6)
    assert np.abs(found["plain"] - expected).max() > 0.02


class Noisy(keras.layers.Layer):
    """Draws by the seed of all layers, and adds a loss."""

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(inputs**2))
        return inputs


def layers_with_state():
    return [
        keras.Input([7]),
        keras.layers.Dense(
            6,
            activation="relu",
            kernel_regularizer=keras.regularizers.L2(0.1),
            activity_regularizer=keras.regularizers.L2(0.1),
        ),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.4, seed=5),
        Noisy(),
        keras.layers.Dense(3),
    ]


@pytest.mark.parametrize(
    "alpha", [pytest.param(0.0, marks=pytest.mark.slow), 1.0]
)
def test_of_the_same_data_nothing_changes(alpha, mirrored):
    """Neither weights nor moving statistics, seeds, losses and metrics.

    All replicas have the same batches, so that cross gradients are their own,
    and all of Keras's step is done once.
    """
    n, strategy = 3, mirrored(3)
    x, y = softmax_data(1)
    weights = np.random.default_rng(0).uniform(0.5, 2, y.shape)
    data = [
        np.repeat(part, n, axis=1).reshape(-1, *part.shape[3:])
        for part in (x, y, weights.astype("float32"))
    ]
    found = []
    for cross_gradients, kind in (
        (None, keras.Sequential),
        (tf_regtopk.CrossGradients(alpha), Network),
    ):
        model, history = train(
            strategy,
            layers_with_state,
            (data[0], data[1]),
            cross_gradients,
            kind=kind,
            learning_rate=0.02,
            sample_weight=data[2],
            batch_size=y[0].size * n,
        )
        parts = [
            [part.numpy() for part in strategy.experimental_local_results(v)]
            for v in (variable.value for variable in model.variables)
        ]
        found.append((parts, history))
    (expected, expected_logs), (actual, logs) = found
    assert len(expected) == 9
    for of_replicas, others in zip(actual, expected, strict=True):
        np.testing.assert_allclose(of_replicas, others, rtol=1e-5, atol=1e-6)
    assert logs.keys() == expected_logs.keys() >= {"accuracy", "loss"}
    for name, values in expected_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-5)


@pytest.mark.slow
def test_graph_eager_and_loops_agree(mirrored):
    n = 3
    x, y = softmax_data(n)
    found = []
    for for_compile in (
        dict(),
        dict(run_eagerly=True),
        dict(steps_per_execution=2),
    ):
        model, _ = train(
            mirrored(n),
            softmax_layers,
            (x.reshape(-1, x.shape[-1]), y.ravel()),
            tf_regtopk.CrossGradients(0.5, SIGN),
            batch_size=y[0].size,
            for_compile=for_compile,
        )
        found.append(local_weights(mirrored(n), model))
    assert gossip_reference.disagreement(found[0]) > 0.02
    for weights in found[1:]:
        np.testing.assert_allclose(weights, found[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`jit_compile` must be False"):
        train(
            mirrored(n),
            softmax_layers,
            (x.reshape(-1, x.shape[-1]), y.ravel()),
            tf_regtopk.CrossGradients(),
            batch_size=y[0].size,
            for_compile=dict(jit_compile=True),
        )


class Functional(tf_regtopk.CrossGradientTraining, keras.Model):
    """A model of inputs and outputs."""


class Subclassed(tf_regtopk.CrossGradientTraining, keras.Model):
    """A model with a table, of rows that not all batches have."""

    def __init__(self):
        super().__init__()
        self.table = keras.layers.Embedding(4, 3)
        self.unused = keras.layers.Dense(2)
        self.unused.build((None, 3))

    def call(self, inputs):
        return self.table(inputs)


def test_kinds_of_models(mirrored, tmp_path):
    """Functional ones, and those with gradients that are slices, or None."""
    n, strategy = 3, mirrored(3)
    x, y = softmax_data(n)
    x, y = x.reshape(-1, x.shape[-1]), y.ravel()

    def functional(layers):
        inputs = keras.Input([7])
        return Functional(inputs, layers[1](inputs))

    weights = [
        local_weights(
            strategy,
            train(
                strategy,
                softmax_layers,
                (x, y),
                tf_regtopk.CrossGradients(),
                kind=kind,
                batch_size=15,
            )[0],
        )
        for kind in (Network, functional)
    ]
    np.testing.assert_array_equal(*weights)
    model, history = train(
        strategy,
        list,
        (np.arange(90) % 4, y),
        tf_regtopk.CrossGradients(),
        kind=lambda _: Subclassed(),
        batch_size=15,
        epochs=3,
    )
    assert history["loss"][-1] < history["loss"][0]
    # Nobody has a gradient for it.
    of_unused = model.unused.kernel.value
    first, *others = strategy.experimental_local_results(of_unused)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_saved_models_load(mirrored, tmp_path):
    x, y = softmax_data(3)
    x, y = x.reshape(-1, x.shape[-1]), y.ravel()
    choices = tf_regtopk.CrossGradients(0.5, SIGN)
    model, _ = train(
        mirrored(3), softmax_layers, (x, y), choices, batch_size=15
    )
    with tf_regtopk.averaged(model):
        model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is Network
    assert loaded.optimizer.cross_gradients == choices
    # A single replica has no neighbours.
    before = loaded.evaluate(x, y, verbose=0)[0]
    loaded.fit(x, y, epochs=3, verbose=0)
    assert loaded.evaluate(x, y, verbose=0)[0] < before


def test_models_and_optimizers_that_do_not_go_together(mirrored):
    x, y = small_models.small_data(12)
    for kind, optimizer, message in (
        (
            keras.Sequential,
            tf_regtopk.DecentralizedOptimizer(
                keras.optimizers.SGD(),
                cross_gradients=tf_regtopk.CrossGradients(),
            ),
            r"class Network\(tf_regtopk.CrossGradientTraining, keras.Model\)",
        ),
        (
            Network,
            tf_regtopk.DecentralizedOptimizer(keras.optimizers.SGD()),
            "must be compiled with a `DecentralizedOptimizer",
        ),
        (Network, keras.optimizers.SGD(), "must be compiled with a `Decent"),
    ):
        model = kind([keras.Input([6]), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        with pytest.raises(ValueError, match=message):
            model.fit(x, y, verbose=0)


def test_a_loss_of_ones_own(mirrored):
    """A `train_step` with another loss says so in `cross_gradient_loss`."""

    class Own(tf_regtopk.CrossGradientTraining, keras.Sequential):
        losses_at = 0

        def train_step(self, data):
            return super().train_step(data)

        def cross_gradient_loss(self, data):
            self.losses_at += 1
            return super().cross_gradient_loss(data)

    x, y = softmax_data(3)
    x, y = x.reshape(-1, x.shape[-1]), y.ravel()
    model, _ = train(
        mirrored(3),
        softmax_layers,
        (x, y),
        tf_regtopk.CrossGradients(),
        kind=Own,
        batch_size=15,
    )
    # Two neighbours of each replica: one pass for each in the program.
    assert model.losses_at == 2 * 3


@pytest.mark.slow
def test_labels_that_differ(mirrored):
    """Each replica has the digits of two classes, around a ring."""
    n = 5
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    images, digits = sklearn_datasets.load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(digits))
    images, digits = images[order], digits[order]
    test, images = np.split(images, [400])
    test_digits, digits = np.split(digits, [400])
    num_steps, batch = 200, 8
    rng = np.random.default_rng(1)
    numbers = np.stack(
        [
            rng.choice(np.flatnonzero(digits // 2 == i), (num_steps, batch))
            for i in range(n)
        ],
        axis=1,
    ).ravel()

    def accuracy(cross_gradients, kind):
        model, _ = train(
            mirrored(n),
            lambda: [
                keras.Input([64]),
                keras.layers.Dense(32, activation="relu"),
                keras.layers.Dense(10),
            ],
            (images[numbers], digits[numbers]),
            cross_gradients,
            kind=kind,
            learning_rate=0.1,
            batch_size=n * batch,
        )
        found = []
        for scope in (contextlib.nullcontext(), tf_regtopk.averaged(model)):
            with scope:
                # All replicas get as many images.
                found.append(
                    model.evaluate(
                        test, test_digits, batch_size=len(test), verbose=0
                    )[1]
                )
        return found

    own, average = accuracy(None, keras.Sequential)
    cross_own, cross_average = accuracy(tf_regtopk.CrossGradients(), Network)
    assert cross_own > own + 0.1
    assert cross_average > average + 0.02
    assert cross_average > 0.94
