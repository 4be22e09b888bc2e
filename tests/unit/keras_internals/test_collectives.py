"""TensorFlow's collectives still do what we rely on."""

import pytest
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.keras_internals import collectives


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
            vars(launcher).pop(collectives._COUNTER, None)
        with pytest.raises(tf.errors.InvalidArgumentError, match="must feed"):
            loop()
        keras_internals.let_collectives_run_in_loops(strategy)
        assert loop() == [6, 6]
        keys = [
            int(getattr(launcher, collectives._COUNTER).numpy())
            for launcher in launchers
        ]
        assert keys == [collectives._FIRST_INSTANCE_KEYS[0] + 4] * 2
    finally:
        for launcher, attributes in zip(launchers, patched, strict=True):
            vars(launcher).clear()
            vars(launcher).update(attributes)
