"""The wrapper in custom training loops."""

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("num_replicas", [0, 2])
def test_custom_loop_builds_lazily(num_replicas, in_graph, mirrored):
    strategy = mirrored(num_replicas)
    with strategy.scope():
        variables = [keras.Variable([1.0, 2.0, 3.0]), keras.Variable(4.0)]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5)
        )

    def step():
        small_models.custom_loop_step(
            strategy,
            optimizer,
            variables,
            lambda n: [
                tf.constant([0.5, -2.0, 0.25]) * tf.cast(n + 1, tf.float32),
                tf.cast(n, tf.float32),
            ],
        )

    step = tf.function(step) if in_graph else step
    for _ in range(2):
        step()
    if num_replicas == 0:
        # Sent: (-2, .5), then (-2, .25 + .25) and .5 again tied: lower first.
        np.testing.assert_allclose(variables[0], [0.0, 6.0, 3.0])
        np.testing.assert_allclose(variables[1], 4.0)
    else:
        # Replica 0 sends -2 and .5 twice; replica 1 -4 and 1 (before the
        # equal scalar), then -4 and the scalar's 2 (before .5 + .5 and 1).
        np.testing.assert_allclose(variables[0], [-1.0, 14.0, 3.0])
        np.testing.assert_allclose(variables[1], 2.0)


def test_autograph_does_not_translate_the_library(monkeypatch):
    optimizer = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(1.0))
    variable = keras.Variable([0.0, 0.0])
    found = []
    take_step = optimizer._step

    def look(*args):
        status = tf.__internal__.autograph.control_status_ctx().status
        found.append(status.name)
        return take_step(*args)

    monkeypatch.setattr(optimizer, "_step", look)

    @tf.function
    def step():
        status = tf.__internal__.autograph.control_status_ctx().status
        found.append(status.name)
        optimizer.apply([tf.ones([2])], [variable])

    step()
    # A function that creates variables is traced twice.
    assert found == ["ENABLED", "DISABLED"] * 2


def test_error_of_a_variable_without_gradient_is_kept():
    """Gradients that come and go, as when losses take turns."""
    variables = [keras.Variable(np.zeros(2, "f4")) for _ in range(2)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.25)
    )
    optimizer.apply(
        [tf.constant([5.0, 1.0]), tf.constant([3.0, 2.0])], variables
    )
    # k = 1.  [5] was sent; [3, 2] is held, and stays while None comes in.
    for _ in range(2):
        optimizer.apply([tf.constant([0.0, 0.25]), None], variables)
    np.testing.assert_array_equal(variables[1], [0.0, 0.0])
    np.testing.assert_array_equal(variables[0], [-5.0, -1.5])
    optimizer.apply([None, tf.constant([0.0, 0.0])], variables)
    np.testing.assert_array_equal(variables[1], [-3.0, 0.0])
    np.testing.assert_array_equal(
        small_models.residual_errors(optimizer)[0], [0.0, 0.0, 0.0, 2.0]
    )


def test_subset_and_order_of_variables():
    variables = [keras.Variable(np.zeros(n, "f4")) for n in (1, 2, 3)]
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(1.0)
    )
    optimizer.build(variables)
    optimizer.apply(
        [tf.constant([3.0, 3.0, 3.0]), tf.constant([1.0])],
        [variables[2], variables[0]],
    )
    for variable, value in zip(variables, (-1.0, 0.0, -3.0), strict=True):
        np.testing.assert_array_equal(variable, np.full(variable.shape, value))
    with pytest.raises(
        ValueError, match="unknown variable.*make a new optimizer"
    ):
        optimizer.apply([tf.constant(1.0)], [keras.Variable(1.0)])
    with pytest.raises(ValueError, match="must hold each variable once"):
        optimizer.apply([tf.ones(1), tf.ones(1)], [variables[0]] * 2)


@pytest.mark.parametrize("in_graph", [False, True])
def test_loss_scale_optimizer_builds_lazily(in_graph, mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variables = [keras.Variable([0.0, 0.0])]
        optimizer = tf_regtopk.LossScaleOptimizer(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5)
            ),
            initial_scale=2.0,
        )

    def step():
        small_models.custom_loop_step(
            strategy, optimizer, variables, lambda n: [tf.constant([4.0, 2.0])]
        )

    if in_graph:
        step = tf.function(step)
    step()
    np.testing.assert_array_equal(variables[0], [-4.0, 0.0])


@pytest.mark.parametrize("is_scaled", [False, True])
def test_variables_are_needed_until_built(is_scaled):
    optimizer = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())
    if is_scaled:
        optimizer = tf_regtopk.LossScaleOptimizer(optimizer)
    with pytest.raises(ValueError, match="`trainable_variables` must be given"):
        optimizer.apply([tf.ones([2])])


def test_empty_gradients_are_no_step():
    optimizer = small_models.wrap(small_models.INNER_OPTIMIZERS["sgd"])()
    optimizer.apply([], [])
    assert int(optimizer.iterations) == 0


def test_all_none_is_the_error_of_keras():
    variables = [keras.Variable(1.0)]
    messages = []
    for make in (
        small_models.INNER_OPTIMIZERS["sgd"],
        small_models.wrap(small_models.INNER_OPTIMIZERS["sgd"]),
    ):
        with pytest.raises(ValueError) as error:
            make().apply([None], variables)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
