"""Checks of what Keras does: loss scaling, saving and `fit`."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
import math
import os
import tempfile

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import Trial


@keras.saving.register_keras_serializable(package="tf_regtopk_selftest")
class Scale(keras.layers.Layer):
    """Multiplies and adds entry by entry, without a matrix product."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.factor = self.add_weight(
            shape=input_shape[1:], initializer="ones", name="factor"
        )
        self.offset = self.add_weight(
            shape=input_shape[-1:], initializer="zeros", name="offset"
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs * self.factor + self.offset


_SCALE_SHAPE = (17, 31)


def loss_scale(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that a float16 overflow halves the scale on all replicas."""
    yield (
        "overflow on the last replica",
        functools.partial(overflow, devices.all),
    )


def overflow(strategy: tf.distribute.Strategy) -> None:
    """Lets a gradient exceed float16 in the second step of three."""
    with strategy.scope():
        layer = Scale(dtype="mixed_float16")
        layer.build((None, *_SCALE_SHAPE))
        variables = layer.trainable_variables
        wrapper = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(trial_lib.LEARNING_RATE),
            parts.SPARSIFIERS["RegTopK"],
        )
        optimizer = tf_regtopk.LossScaleOptimizer(wrapper)
        optimizer.build(variables)

    def step(inputs: tf.Tensor) -> None:
        def take_step(inputs: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                outputs = tf.cast(layer(inputs), tf.float32)
                loss = optimizer.scale_loss(tf.reduce_mean(outputs))
            optimizer.apply(tape.gradient(loss, variables), variables)

        strategy.run(take_step, args=(inputs,))

    def read(*variables: keras.Variable) -> list[np.ndarray]:
        """Returns the values of some variables on each replica."""
        by_variable = [
            [
                value.numpy().ravel()
                for value in strategy.experimental_local_results(v.value)
            ]
            for v in variables
        ]
        return [
            np.concatenate(parts) for parts in zip(*by_variable, strict=True)
        ]

    traced_step = tf.function(step, autograph=False)
    num_replicas = strategy.num_replicas_in_sync
    last = num_replicas - 1
    weights = []
    for largest in (1e-3, 1e4, 1e-3):
        traced_step(
            strategy.experimental_distribute_values_from_function(
                lambda context, largest=largest: tf.fill(
                    [1, *_SCALE_SHAPE],
                    tf.constant(
                        largest
                        if context.replica_id_in_sync_group == last
                        else 1e-3,
                        tf.float16,
                    ),
                )
            )
        )
        weights.append(read(*variables))
        scales = [scale.item() for scale in read(optimizer.dynamic_scale)]
        expected = 2.0**15 if len(weights) == 1 else 2.0**14
        if scales != [expected] * num_replicas:
            raise CheckError(
                f"the scale must be {expected:g} on each replica after step "
                f"{len(weights)}, and is {scales}"
            )
        for other in weights[-1][1:]:
            trial_lib.expect_same(
                "weights", other, weights[-1][0], "those of replica 0"
            )
    trial_lib.expect_same(
        "weights after the overflow", weights[1][0], weights[0][0], "before"
    )
    if np.array_equal(weights[2][0], weights[1][0]):
        raise CheckError("the step after the overflow has changed no weight")
    counted = (
        int(wrapper.iterations.numpy()),
        int(wrapper.skipped_steps.numpy()),
    )
    if counted != (2, 1):
        raise CheckError(
            "(iterations, skipped_steps) must be (2, 1) after an overflow, and "
            f"are {counted}"
        )


def saving(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that training resumes to the bit after saving and loading."""
    for name, strategy in (
        ("all devices", devices.all),
        ("without a strategy", devices.plain),
    ):
        if not devices.quick or strategy is devices.all:
            yield name, functools.partial(save_and_load, strategy)


def save_and_load(strategy: tf.distribute.Strategy) -> None:
    """Saves after two steps, and compares two more with those of a copy."""
    size = math.prod(_SCALE_SHAPE) + _SCALE_SHAPE[-1]
    gradients = trial_lib.make_gradients(
        strategy.num_replicas_in_sync, 4, [(size,)]
    )

    def make_model() -> tuple[keras.Model, Trial]:
        with strategy.scope():
            model = keras.Sequential([keras.Input(_SCALE_SHAPE), Scale()])
            trial = Trial(
                strategy,
                tf_regtopk.RegTopK(0.1),
                variables=model.trainable_variables,
            )
            model.compile(trial.optimizer, "mse")
        return model, trial

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.weights.h5")
        model, trial = make_model()
        trial_lib.run(trial, gradients[:2])
        model.save_weights(path)
        expected = trial_lib.run(trial, gradients[2:])
        model, loaded = make_model()
        model.load_weights(path)
    actual = trial_lib.run(loaded, gradients[2:])
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        trial_lib.expect_same(
            f"weights {number} steps after loading",
            ours,
            theirs,
            "those without saving",
        )


def fit(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks `fit` of a model without matrix products."""
    return _fit_cases(
        devices,
        _SCALE_SHAPE,
        _SCALE_SHAPE,
        lambda: [Scale()],
        # The rate is high because the mean over all entries makes the gradient
        # of each entry small.
        learning_rate=5.0,
        is_first=True,
    )


def fit_dense(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks `fit` of dense layers, which need cuBLAS on GPUs."""
    return _fit_cases(
        devices,
        (8,),
        (3,),
        lambda: [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(3),
        ],
    )


def fit_conv(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks `fit` of convolutions, which need cuDNN on GPUs."""
    return _fit_cases(
        devices,
        (8, 8, 3),
        (4,),
        lambda: [
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(4, 3),
            keras.layers.GlobalAveragePooling2D(),
        ],
    )


def _fit_cases(
    devices: trial_lib.Devices,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    make_layers: Callable[[], list[keras.layers.Layer]],
    learning_rate: float = 0.05,
    is_first: bool = False,
) -> Iterator[parts.Case]:
    for name, strategy in (
        ("all devices", devices.all),
        ("without a strategy", devices.plain),
    ):
        if strategy is devices.all or (is_first and not devices.quick):
            yield (
                name,
                functools.partial(
                    fit_model,
                    strategy,
                    input_shape,
                    output_shape,
                    make_layers,
                    learning_rate,
                ),
            )


def fit_model(
    strategy: tf.distribute.Strategy,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    make_layers: Callable[[], list[keras.layers.Layer]],
    learning_rate: float,
) -> str:
    """Fits a model of given layers, and checks that the model learns."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    num_examples = 16 * strategy.num_replicas_in_sync
    x = rng.standard_normal((num_examples, *input_shape)).astype(np.float32)
    # The target is a mean, because every kind of layer here can learn a mean.
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    y = 0.5 + np.broadcast_to(
        mean.reshape(-1, *[1] * len(output_shape)),
        (num_examples, *output_shape),
    ).astype(np.float32)
    with strategy.scope():
        model = keras.Sequential([keras.Input(input_shape), *make_layers()])
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(learning_rate, momentum=0.9),
                tf_regtopk.RegTopK(0.25),
            ),
            "mse",
        )
    history = model.fit(
        x, y, batch_size=num_examples // 2, epochs=4, verbose=0, shuffle=False
    )
    losses = history.history["loss"]
    if not losses[-1] < 0.95 * losses[0]:
        raise CheckError(f"the loss does not fall: {losses}")
    for variable in model.trainable_variables:
        first, *others = (
            value.numpy()
            for value in strategy.experimental_local_results(variable.value)
        )
        for other in others:
            trial_lib.expect_same(
                f"weights of {variable.path}",
                other,
                first,
                "those of replica 0",
            )
    if int(model.optimizer.skipped_steps.numpy()):
        raise CheckError(
            f"{int(model.optimizer.skipped_steps.numpy())} steps were skipped"
        )
    return f"loss {losses[0]:.3g} to {losses[-1]:.3g}"
