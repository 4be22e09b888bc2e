"""The program of `test_hierarchical_workers.py`, on each of two workers."""

import graphlib
import itertools
import json
import os
import sys

import flat_gradients
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import replica_state

SHAPES = [(3, 5), (7,), (12, 7)]
SIZE = 15 + 7 + 84
NUM_STEPS = 6


def gradients(num_replicas):
    """`[NUM_STEPS, num_replicas, J]`."""
    rng = np.random.default_rng(7)
    shape = (NUM_STEPS, num_replicas, SIZE)
    return rng.standard_normal(shape).astype(np.float32)


FEEDBACK = {
    "accumulate": tf_regtopk.Accumulate(),
    "shift": tf_regtopk.LearnedShift(momentum=0.5),
}


def make(strategy, feedback="accumulate", **kwargs):
    """An optimizer and its variables, all zeros."""
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float32") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0),
            tf_regtopk.RegTopK(density=0.1),
            error_feedback=FEEDBACK[feedback],
            **kwargs,
        )
        optimizer.build(variables)
    return optimizer, variables


def train(
    strategy, g, feedback="accumulate", is_resumed=False, made=None, **kwargs
):
    """Weights after each step, and what is saved in the end.

    Args:
        strategy: The strategy.
        g: `[steps, replicas, J]`.
        feedback: Name in `FEEDBACK`.
        is_resumed: Whether a second optimizer goes on from the saved state.
        made: What `make` has returned, if it has been called.
        **kwargs: Arguments of the optimizer.

    Returns:
        `(weights, saved)`: a list of lists, and the saved state.
    """
    optimizer, variables = made or make(strategy, feedback, **kwargs)
    take_step = flat_gradients.step_function(strategy, optimizer, variables)
    weights = []
    for i, step_gradients in enumerate(g):
        if is_resumed and i == len(g) // 2:
            saved = optimizer.save_state()
            values = [v.numpy() for v in variables]
            optimizer, variables = make(strategy, feedback, **kwargs)
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            # The inner optimizer's, and the wrapper's for what is rounded.
            optimizer.iterations.assign(i)
            optimizer.counters[0].assign(i)
            optimizer.load_state(saved)
            take_step = flat_gradients.step_function(
                strategy, optimizer, variables
            )
        take_step(step_gradients)
        weights.append(flat_gradients.flat_weights(variables).tolist())
    return weights, optimizer.save_state()


def two_devices(strategy_class):
    """Makes a worker's two logical CPUs its devices, as GPUs would be."""
    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    original = strategy_class._initialize_local_devices

    def local_devices(self, cluster_resolver, worker_device):
        original(self, cluster_resolver, worker_device)
        devices = tuple(f"{worker_device}/device:CPU:{i}" for i in range(2))
        return devices, "CPU"

    strategy_class._initialize_local_devices = local_devices


def sent_bytes():
    """Bytes that the loopback interface has sent."""
    with open("/proc/net/dev", encoding="utf-8") as f:
        [line] = [line for line in f if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def bytes_a_step(strategy, num_steps=5, size=200_000, num_workers=2, **kwargs):
    """`(counted, reported)`: what all workers send each other in a step.

    Of so many entries that TensorFlow's own bytes are few beside them. Without
    steps nothing is counted, but None.
    """
    with strategy.scope():
        variable = keras.Variable(np.zeros(size), dtype="float32")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), tf_regtopk.RegTopK(0.05), **kwargs
        )
        optimizer.build([variable])

    @tf.function(autograph=False)
    def step(seed):
        def replica_step():
            replica = tf.distribute.get_replica_context()
            number = tf.convert_to_tensor(replica.replica_id_in_sync_group)
            seeds = tf.stack([seed, number])
            gradient = tf.random.stateless_normal([size], seeds)
            optimizer.apply([gradient], [variable])

        strategy.run(replica_step)

    counted = None
    if num_steps:
        step(tf.constant(0))
        before = sent_bytes()
        for i in range(num_steps):
            step(tf.constant(1 + i))
        counted = (sent_bytes() - before) / num_steps
    sent_by_all = num_workers * optimizer.wire_report().sent_bytes
    return counted, sent_by_all


def order_of_collectives(strategy, **kwargs):
    """Which collectives there are, and which of one device nothing orders.

    Of a step with all that communicates: workers' entries, variables exchanged
    densely, a metric and the loss.

    Args:
        strategy: The strategy.
        **kwargs: Arguments of the optimizer.
    """
    optimizer, variables = make(strategy, dense_below=10, **kwargs)
    with strategy.scope():
        metric = keras.metrics.Mean()

    def replica_step():
        optimizer.apply([tf.ones(v.shape) for v in variables], variables)
        metric.update_state(1.0)
        return tf.reduce_sum(variables[0])

    @tf.function(autograph=False)
    def step():
        loss = strategy.run(replica_step)
        return strategy.reduce("MEAN", loss, axis=None), metric.result()

    graph = step.get_concrete_function().graph
    inputs = {
        op: {tensor.op for tensor in op.inputs} | {*op.control_inputs}
        for op in graph.get_operations()
    }
    before = {}
    for op in graphlib.TopologicalSorter(inputs).static_order():
        before[op] = inputs[op].union(*(before[other] for other in inputs[op]))
    collectives = [op for op in before if op.type.startswith("Collective")]
    pairs = [
        (a, b)
        for a, b in itertools.combinations(collectives, 2)
        if a.device == b.device
    ]

    def constant(tensor):
        return tf.get_static_value(tensor).item()

    collectives.sort(key=lambda op: len(before[op]))
    sequences = {device: [] for device in sorted({a.device for a, _ in pairs})}
    for op in collectives:
        sequences[op.device].append([op.type, constant(op.inputs[1])])
    return {
        "groups": len({constant(op.inputs[2]) for op in collectives}),
        "sequences": [*sequences.values()],
        "unordered": [
            [a.name, b.name]
            for a, b in pairs
            if a not in before[b] and b not in before[a]
        ],
    }


def main(result_path):
    from tensorflow.python.distribute import collective_all_reduce_strategy

    two_devices(collective_all_reduce_strategy.CollectiveAllReduceExtended)
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    num_replicas = strategy.num_replicas_in_sync
    g = gradients(num_replicas)
    result = {"num_replicas": num_replicas, "hierarchical": {}}
    for feedback, is_resumed in (
        ("accumulate", False),
        ("shift", False),
        ("shift", True),
    ):
        weights, saved = train(
            strategy, g, feedback, is_resumed, hierarchical=True
        )
        name = f"{feedback}, resumed" if is_resumed else feedback
        result["hierarchical"][name] = {
            "weights": weights,
            "num_replicas": saved.num_replicas,
            "replicas": sorted(saved.replicas),
        }
    result["hierarchical"]["accumulated"], _ = train(
        strategy,
        np.repeat(g, 2, axis=0),
        hierarchical=True,
        accumulation_steps=2,
    )
    with strategy.scope():
        worker = strategy.cluster_resolver.task_id
        state = replica_state.ReplicaState(lambda: tf.constant(worker))
    result["initial"] = [int(a) for [a] in state.local_arrays()]
    # TensorFlow's own time-outs start a thread for each collective.
    before = len(os.listdir("/proc/self/task"))
    weights, _ = train(strategy, np.tile(g, [5, 1, 1]))
    result["new_threads"] = len(os.listdir("/proc/self/task")) - before
    result["flat"] = weights[:NUM_STEPS]
    result["bytes"] = {
        name: bytes_a_step(strategy, hierarchical=hierarchical)
        for name, hierarchical in (("hierarchical", True), ("flat", False))
    }
    result["order"] = order_of_collectives(strategy, hierarchical=True)
    auto, _ = make(strategy, exchange="auto")
    result["auto"] = [auto.chosen_exchange, auto.exchange_seconds]
    with open(result_path, "w", encoding="utf-8") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
