"""TensorFlow's collective still takes sizes and keys that change."""

import tensorflow as tf

from tf_regtopk import keras_internals


def test_size_and_keys_are_tensors():
    """Or a step would be traced anew for each group.

    tests/integration/test_decentralized_workers.py runs these collectives.
    """

    @tf.function(autograph=False)
    def exchange(payload, size, group_key, instance_key):
        return tf.cond(
            size > 1,
            lambda: keras_internals.exchange_in_group(
                payload, size, group_key, instance_key
            ),
            lambda: payload[tf.newaxis],
        )

    scalar = tf.TensorSpec([], tf.int32)
    concrete = exchange.get_concrete_function(
        tf.TensorSpec([3], tf.float32), scalar, scalar, scalar
    )
    definition = concrete.graph.as_graph_def()
    nodes = [
        node
        for function in definition.library.function
        for node in function.node_def
        if node.op.startswith("Collective")
    ]
    assert [node.op for node in nodes] == ["CollectiveAllToAllV2"]
    assert nodes[0].device.endswith("CPU:0")
    constants = {
        node.name
        for function in definition.library.function
        for node in function.node_def
        if node.op == "Const"
    }
    keys = [name.partition(":")[0] for name in nodes[0].input[1:4]]
    assert len(keys) == 3
    assert not constants & {*keys}
