"""Each private part of Keras and TensorFlow still does what we rely on."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

from tf_regtopk import keras_internals


def apply_per_replica_gradients(strategy, optimizer, gradients):
    """Applies `gradients[n]` on replica n; returns each replica's weight."""
    with strategy.scope():
        variable = keras.Variable(0.0)
        optimizer.build([variable])

    def step():
        n = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([tf.gather(gradients, n)], [variable])

    strategy.run(step)
    return [
        float(value)
        for value in strategy.experimental_local_results(variable.value)
    ]


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
    assert apply_per_replica_gradients(strategy, optimizer, gradients) == [
        -1.0,
        -10.0,
    ]


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


def test_strategy_of_an_optimizer(mirrored):
    assert (
        keras_internals.strategy_of(keras.optimizers.SGD())
        is tf.distribute.get_strategy()
    )
    with mirrored(2).scope():
        optimizer = keras.optimizers.SGD()
    assert keras_internals.strategy_of(optimizer) is mirrored(2)


def test_xla_context():
    seen = []

    def look():
        seen.append(keras_internals.in_xla_context())
        return tf.constant(0)

    look()
    tf.function(look)()
    tf.function(look, jit_compile=True)()
    tf.function(lambda: tf.function(look)(), jit_compile=True)()
    assert seen == [False, False, True, True]


def test_op_determinism():
    assert not keras_internals.is_op_determinism_enabled()
    tf.config.experimental.enable_op_determinism()
    try:
        assert keras_internals.is_op_determinism_enabled()
    finally:
        config.disable_op_determinism()
    assert not keras_internals.is_op_determinism_enabled()


def test_collectives_in_functions_that_loops_call(mirrored):
    """TensorFlow still feeds no key there (keras#19246); ours is counted."""
    strategy = mirrored(2)
    launchers = strategy.extended._cross_device_ops._launchers
    patched = [dict(vars(launcher)) for launcher in launchers]

    def loop():
        @tf.function
        def total():
            def of_replica():
                replica = tf.distribute.get_replica_context()
                number = tf.cast(replica.replica_id_in_sync_group, tf.float32)
                return replica.all_reduce("SUM", number + 1.0)

            results = strategy.run(of_replica)
            return strategy.experimental_local_results(results)[0]

        @tf.function(autograph=False)
        def totals():
            return tf.while_loop(
                lambda i, x: i < 3,
                lambda i, x: (
                    i + 1,
                    x + tf.cond(tf.equal(i, 1), lambda: 0.0, total),
                ),
                (0, 0.0),
            )[1]

        return [totals().numpy() for _ in range(2)]

    try:
        for launcher in launchers:
            vars(launcher).pop("_next_instance_key", None)
            vars(launcher).pop(keras_internals._COUNTER, None)
        with pytest.raises(tf.errors.InvalidArgumentError, match="must feed"):
            loop()
        keras_internals.let_collectives_run_in_loops(strategy)
        assert loop() == [6, 6]
        keys = [
            int(getattr(launcher, keras_internals._COUNTER).numpy())
            for launcher in launchers
        ]
        assert keys == [keras_internals._FIRST_INSTANCE_KEY + 4] * 2
    finally:
        for launcher, attributes in zip(launchers, patched, strict=True):
            vars(launcher).clear()
            vars(launcher).update(attributes)
