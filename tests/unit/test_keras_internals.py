"""Each private part of Keras and TensorFlow still does what we rely on."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.framework import config

import tf_regtopk
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
    keras_internals.give_back(optimizer)
    assert "_all_reduce_sum_gradients" not in vars(optimizer)


@pytest.mark.parametrize(
    "owner, name, path",
    [
        (
            keras.optimizers.Optimizer,
            "_all_reduce_sum_gradients",
            "_all_reduce_sum_gradients",
        ),
        (
            cross_device_utils.CollectiveReplicaLauncher,
            "_next_instance_key",
            "CollectiveReplicaLauncher._next_instance_key",
        ),
    ],
)
def test_an_upstream_without_a_part_is_refused(monkeypatch, owner, name, path):
    [defined_in] = [base for base in owner.__mro__ if name in vars(base)]
    monkeypatch.delattr(defined_in, name)
    with pytest.raises(
        RuntimeError,
        match=f"must have `[A-Za-z_.]+.{path}`.*Keras {keras.__version__}",
    ):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())


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


def test_tensorflow_leaves_the_positions_of_unknown_children(tmp_path):
    found = []

    class Positions:
        def append(self, position):
            found.append(position)

    class Deferred:
        def setdefault(self, *_):
            return Positions()

        def pop(self, _, default):
            return default

    class Unknowing(tf.Module):
        def _lookup_dependency(self, name, cached_dependencies=None):
            if cached_dependencies is None:
                return super()._lookup_dependency(name)
            return None

        @property
        def _deferred_dependencies(self):
            return Deferred()

    saved, restored = tf.Module(), Unknowing()
    saved.a, restored.a = tf.Variable(1.0), tf.Variable(2.0)
    path = tf.train.Checkpoint(child=saved).write(str(tmp_path / "c"))
    status = tf.train.Checkpoint(child=restored).read(path)
    [position] = found
    checkpoint = position.checkpoint
    [node] = [
        checkpoint.object_graph_proto.nodes[number]
        for number, bound in checkpoint.object_by_proto_id.items()
        if bound is restored
    ]
    assert [child.local_name for child in node.children] == ["a"]
    with pytest.raises(AssertionError):
        status.assert_existing_objects_matched()
    position.restore(restored.a)
    assert restored.a.numpy() == 1.0
    assert restored.a._update_uid == checkpoint.restore_uid
    status.assert_existing_objects_matched()


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
        assert keys == [keras_internals._FIRST_INSTANCE_KEYS[0] + 4] * 2
    finally:
        for launcher, attributes in zip(launchers, patched, strict=True):
            vars(launcher).clear()
            vars(launcher).update(attributes)
