"""Programs that replicas share, and optimizers that are made alike."""

import dataclasses
import gc
import weakref

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf

import tf_regtopk
from tf_regtopk import keras_internals
from tf_regtopk.kernels import device_kind
from tf_regtopk.kernels import tracing


class Doubling:
    """A step with a method that replicas compile."""

    def __init__(self):
        self.seen = []

    @tracing.compiled
    def double(self, values, variable, is_doubled):
        self.seen.append(
            (
                tf.distribute.get_strategy().num_replicas_in_sync,
                tf.distribute.in_cross_replica_context(),
            )
        )
        variable.assign_add(values)
        return 2 * values if is_doubled else values


def asserted(values):
    tf.debugging.assert_less(tf.reduce_max(values), 9.0)
    return 2 * values


@pytest.mark.parametrize(
    "function",
    [
        lambda values: values + tf.random.normal([2]),
        lambda values: tf.random.shuffle(values),
        asserted,
    ],
)
def test_stateful_operations_are_refused(function, mirrored):
    """TensorFlow would run those of all replicas one after the other."""
    compiled = tracing.compiled(function)

    @tf.function
    def step():
        return mirrored(2).run(lambda: compiled(tf.ones([2])))

    with pytest.raises(
        ValueError, match=r"stateful op.*Received: the .*\(\w+\)"
    ):
        step()


def test_random_numbers_without_a_state_are_not(mirrored):
    compiled = tracing.compiled(
        lambda step: tf.random.stateless_normal([2], seed=[step, 0])
    )

    @tf.function
    def step():
        return mirrored(2).run(lambda: compiled(tf.constant(3)))

    first, second = mirrored(2).experimental_local_results(step())
    np.testing.assert_array_equal(first, second)
    assert first.numpy().all()


def test_replicas_share_what_is_traced(mirrored):
    strategy, doubling = mirrored(3), Doubling()
    with strategy.scope():
        mirrored_variable = tf.Variable([1.0])
    variables = strategy.experimental_local_results(mirrored_variable)

    def replica_step(is_doubled):
        context = tf.distribute.get_replica_context()
        rank = int(tf.get_static_value(context.replica_id_in_sync_group))
        own = tf.constant([5.0 + rank])
        return doubling.double(own, variables[rank], is_doubled)

    @tf.function
    def step(is_doubled):
        return strategy.experimental_local_results(
            strategy.run(replica_step, args=(is_doubled,))
        )

    np.testing.assert_array_equal(step(True), [[10.0], [12.0], [14.0]])
    # Once, with the strategy in force.
    assert doubling.seen == [(3, False)]
    np.testing.assert_array_equal(step(False), [[5.0], [6.0], [7.0]])
    assert doubling.seen == [(3, False)] * 2
    # Each has assigned a variable of its own.
    np.testing.assert_array_equal(variables, [[11.0], [13.0], [15.0]])


def test_a_program_is_compiled_for_each_replica(mirrored):
    @tracing.compiled
    def square(x):
        return x * x

    @tf.function
    def step():
        return mirrored(2).run(lambda: square(tf.constant(3.0)))

    for operation in step.get_concrete_function().graph.get_operations():
        if "PartitionedCall" in operation.type:
            assert operation.get_attr("_XlaMustCompile")
    assert square.function.experimental_get_tracing_count() == 1
    np.testing.assert_array_equal(square(tf.constant(4.0)), 16.0)


@dataclasses.dataclass(frozen=True)
class OwnTopK(tf_regtopk.Sparsifier):
    """A class of a user, whose code may change between two optimizers."""

    def score(self, a, memory, step):
        return a


def trained(sparsifier, strategy, error_feedback=None):
    """The step of a new optimizer after two steps, and the variables."""
    with strategy.scope():
        variables = [keras.Variable(np.zeros(50, np.float32))]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0),
            sparsifier,
            error_feedback=error_feedback,
        )
        optimizer.build(variables)
    for _ in range(2):
        small_models.custom_loop_step(
            strategy,
            optimizer,
            variables,
            lambda n: [tf.range(50.0) * tf.cast(n + 1, tf.float32)],
        )
    return optimizer._partition.sparse_step, variables


def test_an_optimizer_made_anew_is_not_compiled_again(mirrored):
    tracing.forget()
    first, _ = trained(tf_regtopk.RegTopK(0.1), mirrored(2))
    counts = first.send.function.experimental_get_tracing_count()
    again, [variable] = trained(tf_regtopk.RegTopK(0.1), mirrored(2))
    assert again is first
    assert first.send.function.experimental_get_tracing_count() == counts
    tracing.forget()
    fresh, [expected] = trained(tf_regtopk.RegTopK(0.1), mirrored(2))
    assert fresh is not first
    np.testing.assert_array_equal(variable, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda mirrored: trained(tf_regtopk.RegTopK(0.2), mirrored(2)),
        lambda mirrored: trained(tf_regtopk.RegTopK(0.1, mu=9.0), mirrored(2)),
        lambda mirrored: trained(tf_regtopk.TopK(0.1), mirrored(2)),
        lambda mirrored: trained(tf_regtopk.RegTopK(0.1), mirrored(3)),
        lambda mirrored: trained(
            tf_regtopk.RegTopK(0.1), mirrored(2), tf_regtopk.EF21()
        ),
    ],
)
def test_another_optimizer_is_compiled(change, mirrored):
    first, _ = trained(tf_regtopk.RegTopK(0.1), mirrored(2))
    other, _ = change(mirrored)
    assert other is not first


def test_another_kind_of_device_is_compiled_for():
    # A number, as an object that keeps its argument.
    on_cpu = tracing.of_equal(complex, 1)
    assert tracing.of_equal(complex, 1) is on_cpu
    with device_kind.compile_for("GPU"):
        assert tracing.of_equal(complex, 1) is not on_cpu


def test_deterministic_operations_are_compiled_for(monkeypatch):
    before = tracing.of_equal(complex, 1)
    monkeypatch.setattr(
        keras_internals, "is_op_determinism_enabled", lambda: True
    )
    assert tracing.of_equal(complex, 1) is not before


def test_code_of_users_is_compiled_each_time(mirrored, monkeypatch):
    _, [before] = trained(OwnTopK(0.1), mirrored(2))
    monkeypatch.setattr(OwnTopK, "score", lambda self, a, *_: 1 / (1 + a))
    _, [after] = trained(OwnTopK(0.1), mirrored(2))
    assert np.flatnonzero(before).min() >= 40
    assert np.flatnonzero(after).max() < 10


def test_variables_are_not_kept(mirrored):
    _, [variable] = trained(tf_regtopk.TopK(0.1), mirrored(0))
    alive = weakref.ref(variable)
    del variable
    keras.utils.clear_session()
    gc.collect()
    assert alive() is None
