"""TensorFlow's collective still takes sizes and keys that change."""

import group_order_program
import multi_worker_launcher
import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk.distribute import topology as topology_lib


def test_size_and_keys_are_tensors():
    """Or a step would be traced anew for each group.

    tests/integration/test_decentralized_workers.py runs these collectives.
    """

    @tf.function(autograph=False)
    def exchange(payloads, size, group_key, instance_key):
        return tf.cond(
            size > 1,
            lambda: keras_internals.exchange_in_group(
                payloads, size, group_key, instance_key
            ),
            lambda: payloads,
        )

    scalar = tf.TensorSpec([], tf.int32)
    concrete = exchange.get_concrete_function(
        tf.TensorSpec([None, 3], tf.float32), scalar, scalar, scalar
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


def test_links_are_tensors_and_wait_for_each_other():
    """A worker that could only receive after it has sent would wait forever."""

    @tf.function(autograph=False)
    def pass_on(payload, *keys):
        to, before = (keras_internals.Link(*keys[i : i + 2]) for i in (0, 2))
        return tf.cond(
            keys[0] > 0,
            lambda: keras_internals.pass_on(payload, to, before),
            lambda: payload,
        )

    scalar = tf.TensorSpec([], tf.int32)
    concrete = pass_on.get_concrete_function(
        tf.TensorSpec([3], tf.float32), *[scalar] * 4
    )
    [nodes] = [
        function.node_def
        for function in concrete.graph.as_graph_def().library.function
        if any(node.op.startswith("Collective") for node in function.node_def)
    ]
    by_op = {node.op: node for node in nodes}
    ops = ("CollectiveBcastSendV2", "CollectiveBcastRecvV2")
    constants = {node.name for node in nodes if node.op == "Const"}
    for op, first in zip(ops, (2, 1), strict=True):
        node = by_op[op]
        assert node.device.endswith("CPU:0")
        keys = [i.partition(":")[0] for i in node.input[first : first + 2]]
        assert len(keys) == 2
        assert not constants & {*keys}
        names = {other.name for other in map(by_op.__getitem__, ops)}
        assert not names & {i.lstrip("^").partition(":")[0] for i in node.input}
    assert any(f"^{by_op[ops[0]].name}" in node.input for node in nodes)


def test_members_have_the_order_that_a_cluster_tells(tmp_path):
    [rows] = multi_worker_launcher.run_workers(
        group_order_program.__file__,
        num_workers=0,
        directory=tmp_path,
        timeout=120,
    )
    cluster = topology_lib.Cluster(num_replicas=11, num_workers=11)
    expected = cluster.in_order(group_order_program.MEMBERS)
    assert rows == [expected] * len(expected)
