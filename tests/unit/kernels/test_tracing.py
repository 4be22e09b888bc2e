import numpy as np
import tensorflow as tf

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
