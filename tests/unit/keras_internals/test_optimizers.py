"""Keras's optimizers still do what we rely on."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_regtopk import keras_internals


def apply_per_replica_gradients(strategy, optimizer, gradients, apply=None):
    """Applies `gradients[n]` on replica n; returns each replica's weight."""
    with strategy.scope():
        variable = keras.Variable(0.0)
        optimizer.build([variable])

    def step():
        n = tf.distribute.get_replica_context().replica_id_in_sync_group
        (apply or optimizer.apply)([tf.gather(gradients, n)], [variable])

    strategy.run(step)
    return [
        float(value)
        for value in strategy.experimental_local_results(variable.value)
    ]


def test_schedules_are_found():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=4)
    for rate, expected in ((schedule, schedule), (0.1, None)):
        optimizer = keras.optimizers.SGD(rate)
        assert keras_internals.learning_rate_schedule(optimizer) is expected


def test_keras_sums_gradients_where_we_turn_it_off(mirrored):
    strategy = mirrored(2)
    gradients = tf.constant([1.0, 10.0])
    with strategy.scope():
        optimizer = keras.optimizers.SGD(1.0)
    assert apply_per_replica_gradients(strategy, optimizer, gradients) == [
        -11.0,
        -11.0,
    ]
    with strategy.scope():
        optimizer = keras.optimizers.SGD(1.0)
    keras_internals.take_aggregated_gradients(optimizer)
    apply = functools.partial(keras_internals.apply_aggregated, optimizer)
    assert apply_per_replica_gradients(
        strategy, optimizer, gradients, apply
    ) == [-1.0, -10.0]
    # The weights of replicas would drift apart.
    with pytest.raises(ValueError, match="applied by its wrapper only.*unwrap"):
        strategy.run(lambda: optimizer.apply([tf.constant(1.0)]))
    keras_internals.give_back(optimizer)
    assert "_all_reduce_sum_gradients" not in vars(optimizer)
    with pytest.raises(ValueError, match="wrap a new one. Received"):
        apply([tf.constant(1.0)], [])


def test_the_method_turned_off_is_as_we_know_it():
    method = keras.optimizers.Optimizer._all_reduce_sum_gradients
    assert list(inspect.signature(method).parameters) == [
        "self",
        "grads_and_vars",
    ]
    variable = keras.Variable(1.0).value
    pairs = [(tf.constant(2.0), variable)]
    result = keras.optimizers.SGD()._all_reduce_sum_gradients(pairs)
    assert len(result) == 1 and result[0][1] is variable
    np.testing.assert_array_equal(result[0][0], 2.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adafactor_divides_by_zero_where_we_keep_it_from_it(dtype):
    """In the rows and columns of zeros; and the rest stays to the bit."""
    gradient = np.zeros((3, 4))
    gradient[1, 2] = 0.1

    def weights_after_steps(change):
        variable = keras.Variable(np.ones((3, 4)), dtype=dtype)
        optimizer = keras.optimizers.Adafactor(0.01)
        optimizer.build([variable])
        change(optimizer)
        for _ in range(2):
            optimizer.apply([tf.constant(gradient, dtype)], [variable])
        return variable.numpy().astype("float32")

    plain = weights_after_steps(lambda optimizer: None)
    assert np.isnan(plain).any()
    kept = weights_after_steps(keras_internals.divide_by_no_zeros)
    assert kept[1, 2] < 1.0 and np.isfinite(kept).all()
    np.testing.assert_array_equal(kept[gradient == 0], 1.0)
    same = ~np.isnan(plain)
    np.testing.assert_array_equal(kept[same], plain[same])


def test_strategy_of_an_optimizer(mirrored):
    assert (
        keras_internals.strategy_of(keras.optimizers.SGD())
        is tf.distribute.get_strategy()
    )
    with mirrored(2).scope():
        optimizer = keras.optimizers.SGD()
    assert keras_internals.strategy_of(optimizer) is mirrored(2)


def test_keras_saves_the_optimizer_that_compile_was_given():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer = keras.optimizers.Adam()
    config = model.get_compile_config()
    assert config["optimizer"]["class_name"] == "SGD"
    optimizer = keras.optimizers.Lion()
    model.train_function = 1
    keras_internals.replace_optimizer(model, optimizer)
    assert model.optimizer is optimizer and model.train_function is None
    config = model.get_compile_config()
    assert config["optimizer"]["class_name"] == "Lion"
    assert config["loss"] == "mse"
    optimizer.build(model.trainable_variables)
    kernel, bias = keras_internals.variables_of(optimizer)
    assert kernel is model.layers[0].kernel and bias is model.layers[0].bias
