"""TensorFlow's collectives still do what we rely on."""

import pytest
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.keras_internals import collective_keys


def test_collectives_in_functions_that_loops_call(mirrored):
    """TensorFlow still feeds no key there (keras#19246); ours is counted."""
    strategy = tf.distribute.MirroredStrategy(
        mirrored(2).extended.worker_devices
    )

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

    with pytest.raises(tf.errors.InvalidArgumentError, match="must feed"):
        loop()
    # Which lets them run in loops too.
    keras_internals.keep_collectives_apart(strategy)
    assert loop() == [6, 6]
    keys = [
        int(getattr(launcher, collective_keys.COUNTER).numpy())
        for launcher in strategy.extended._cross_device_ops._launchers
    ]
    assert keys == [collective_keys.FIRST_INSTANCE_KEYS[0] + 4] * 2


def test_keys_of_the_collectives_of_each_strategy(mirrored):
    """TensorFlow still gives those of all strategies the same keys."""
    devices = mirrored(2).extended.worker_devices
    strategies = [tf.distribute.MirroredStrategy(devices) for _ in range(2)]

    def keys():
        return [
            [
                (launcher._group_key, launcher._collective_keys)
                for launcher in strategy.extended._cross_device_ops._launchers
            ]
            for strategy in strategies
        ]

    assert len({group for pairs in keys() for group, _ in pairs}) == 1
    for strategy in strategies:
        keras_internals.keep_collectives_apart(strategy)
    kept = keys()
    for pairs in kept:
        assert len(set(pairs)) == 1  # The replicas of a strategy meet.
    assert len({group for pairs in kept for group, _ in pairs}) == 2
    # Nor do functions meet that were traced before.
    first_keys = [
        keys.get_instance_key(group, device)
        for [(group, keys), _] in kept
        for device in devices
    ]
    assert first_keys[0] == first_keys[1] and first_keys[2] == first_keys[3]
    assert (
        abs(first_keys[0] - first_keys[2]) == collective_keys.NUM_INSTANCE_KEYS
    )
    keras_internals.keep_collectives_apart(strategies[0])
    assert keys() == kept


def test_other_strategies_keep_their_keys(mirrored):
    for strategy in (tf.distribute.get_strategy(), mirrored(3)):
        keras_internals.keep_collectives_apart(strategy)
