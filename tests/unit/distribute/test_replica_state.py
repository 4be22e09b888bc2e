"""State that each replica has of its own."""

import numpy as np
import tensorflow as tf

from tf_regtopk.distribute import replica_state
from tf_regtopk.kernels import words


def test_replica_state(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        state = replica_state.ReplicaState(
            lambda: ((tf.zeros([2]),), (tf.constant(7),))
        )

    @tf.function
    def step():
        n = tf.distribute.get_replica_context().replica_id_in_sync_group
        (error,), (memory,) = state.variables()
        error.assign_add(tf.fill([2], tf.cast(n + 1, tf.float32)))
        number = words.release(memory.read_value(), tf.int32)
        memory.assign(words.hold(number * n))

    for _ in range(2):
        strategy.run(step)
    (error_0, memory_0), (error_1, memory_1) = state.local_arrays()
    np.testing.assert_array_equal(error_0, [2.0, 2.0])
    np.testing.assert_array_equal(error_1, [4.0, 4.0])
    assert (memory_0, memory_1) == (0, 7)
    assert list(state.replicas) == [0, 1] and state.num_replicas == 2
    [[error], [memory]] = state.initial_arrays()
    state.assign_local([[error_1, memory_1], [error, memory]])
    (error_0, memory_0), (error_1, memory_1) = state.local_arrays()
    np.testing.assert_array_equal(error_0, [4.0, 4.0])
    np.testing.assert_array_equal(error_1, [0.0, 0.0])
    assert (memory_0, memory_1) == (7, 7)
