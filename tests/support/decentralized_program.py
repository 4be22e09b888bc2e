"""The program of `test_decentralized_workers.py`, on each of four workers."""

import json
import os
import pathlib
import sys
import time

import flat_gradients
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import travelling

N = 4
SHAPES = [(3, 5), (7,), (4, 2)]
SIZE = 15 + 7 + 8
NUM_STEPS = 5
RING = tf_regtopk.Ring()
PAIRS = [[0, 3], [1, 2]]

# Arguments of the optimizer.
CASES = {
    "complete": dict(topology=tf_regtopk.Complete()),
    "ring": dict(topology=RING),
    "torus": dict(topology=tf_regtopk.Torus()),
    "exponential": dict(topology=tf_regtopk.Exponential()),
    "one peer": dict(topology=tf_regtopk.OnePeerExponential()),
    "grid": dict(topology=tf_regtopk.Grid(2)),
    # The first clique is larger than the second.
    "cliques": dict(topology=tf_regtopk.Cliques([[0, 3, 1], [2]])),
    "clique gradients": dict(
        topology=tf_regtopk.Cliques(PAIRS, average_gradients=True)
    ),
    "periodic": dict(topology=tf_regtopk.PeriodicGlobalAveraging(RING, 3)),
    "directed": dict(topology=tf_regtopk.OnePeerExponential(directed=True)),
    # One replica is idle in the steps that are no means of all.
    "ring pass": dict(
        topology=tf_regtopk.PeriodicGlobalAveraging(
            tf_regtopk.RingPass([[0, 1, 2], [3]]), 2
        )
    ),
    "choco": dict(
        topology=RING,
        sparsifier=tf_regtopk.TopK(0.2),
        error_feedback=tf_regtopk.EF21(),
        consensus_step_size=0.3,
    ),
    "squeeze": dict(
        sparsifier=tf_regtopk.TopK(0.2),
        error_feedback=tf_regtopk.Accumulate(),
        consensus_step_size=0.3,
    ),
    "eight bits": dict(
        codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        error_feedback=tf_regtopk.Accumulate(),
    ),
    "period": dict(topology=RING, communication_period=2),
    "nonlinear": dict(
        topology=RING, mixing_rule=tf_regtopk.NonlinearGossip(0.5, 0.5)
    ),
    "tracker": dict(
        topology=RING,
        mixing_rule=tf_regtopk.AverageTracker(),
        communication_period=2,
    ),
    "cross gradients": dict(
        topology=RING,
        cross_gradients=tf_regtopk.CrossGradients(
            alpha=0.75, codec=tf_regtopk.Codec(values="sign")
        ),
    ),
    # Other neighbours in each step, some of whom there are fewer of.
    "cross gradients of cliques": dict(
        topology=tf_regtopk.PeriodicGlobalAveraging(
            tf_regtopk.Cliques([[0, 3, 1], [2]]), 2
        ),
        cross_gradients=tf_regtopk.CrossGradients(
            alpha=0.5, codec=tf_regtopk.Codec(values="natural")
        ),
    ),
    "cross gradients of weights": dict(
        topology=tf_regtopk.OnePeerExponential(directed=True),
        cross_gradients=tf_regtopk.CrossGradients(alpha=0),
    ),
}


def gradients(is_bad=False):
    """`[NUM_STEPS, N, J]`; if bad, one of the third replica has a NaN."""
    rng = np.random.default_rng(3)
    g = rng.standard_normal((NUM_STEPS, N, SIZE)).astype(np.float32)
    if is_bad:
        g[1, 2, 4] = np.nan
    return g / N


def make(strategy, learning_rate=0.1, dtype="float32", momentum=0.9, **kwargs):
    """An optimizer, built, and its variables, random numbers."""
    rng = np.random.default_rng(4)
    with strategy.scope():
        variables = [
            keras.Variable(rng.standard_normal(shape), dtype=dtype)
            for shape in SHAPES
        ]
        optimizer = tf_regtopk.DecentralizedOptimizer(
            keras.optimizers.SGD(learning_rate, momentum=momentum), **kwargs
        )
        optimizer.build(variables)
    return optimizer, variables


def make_step(strategy, **kwargs):
    """A function that takes a step, the variables, and their optimizer."""
    optimizer, variables = make(strategy, **kwargs)
    step_function = (
        cross_step_function
        if optimizer.cross_gradients
        else flat_gradients.step_function
    )
    step = step_function(strategy, optimizer, variables)
    return step, variables, optimizer


def cross_step_function(strategy, optimizer, variables):
    """As `flat_gradients.step_function`, of a loss with the sine of weights."""

    @tf.function(autograph=False)
    def step(flat):
        def replica_step(flat):
            def gradients_at(_, values):
                parts = tf.split(flat, [np.prod(shape) for shape in SHAPES])
                return [
                    tf.reshape(part, shape) + tf.sin(3 * value) / N
                    for part, shape, value in zip(
                        parts, SHAPES, values, strict=True
                    )
                ]

            values = [tf.convert_to_tensor(v) for v in variables]
            with optimizer.with_gradients_at(gradients_at):
                optimizer.apply(gradients_at(variables, values), variables)

        strategy.run(replica_step, args=(flat,))

    def take_step(gradients):
        step(
            strategy.experimental_distribute_values_from_function(
                lambda ctx: tf.constant(
                    gradients[ctx.replica_id_in_sync_group], tf.float32
                )
            )
        )

    return take_step


def local_weights(strategy, variables):
    """For each replica of this process its weights `[J]`."""
    parts = [
        strategy.experimental_local_results(variable.value)
        for variable in variables
    ]
    return [
        np.concatenate([part.numpy().ravel() for part in of_replica])
        for of_replica in zip(*parts, strict=True)
    ]


def train(strategy, g=None, made=None, **kwargs):
    """For each step and each replica of this process its weights.

    Args:
        strategy: The strategy.
        g: `[steps, replicas, J]`.
        made: What `make_step` has returned, if it has been called.
        **kwargs: Arguments of the optimizer.
    """
    take_step, variables, optimizer = made or make_step(strategy, **kwargs)
    weights = []
    for step_gradients in gradients() if g is None else g:
        take_step(step_gradients)
        weights.append([w.tolist() for w in local_weights(strategy, variables)])
    if optimizer.mixing_rule.tracks_average:
        optimizer.use_tracked_average()
        weights.append([w.tolist() for w in local_weights(strategy, variables)])
    return weights


def take_many_steps(strategy, num_steps=7):
    """Weights after steps in a loop of one function, of an odd ring of 3 + 1.

    As `steps_per_execution` of Keras takes them.
    """
    topology = tf_regtopk.RingPass([[0, 1, 2], [3]])
    optimizer, variables = make(strategy, topology=topology)
    zeros = [tf.zeros(shape) for shape in SHAPES]

    @tf.function(autograph=False)
    def steps():
        def step(i):
            strategy.run(lambda: optimizer.apply(zeros, variables))
            return (i + 1,)

        return tf.while_loop(lambda i: i < num_steps, step, (0,))

    first = strategy.cluster_resolver.task_id if is_cluster() else 0
    for variable in variables:
        parts = strategy.experimental_local_results(variable.value)
        for rank, part in enumerate(parts, first):
            part.assign_add(tf.fill(part.shape, 10.0 * rank))
    before = local_weights(strategy, variables)
    steps()
    return [w.tolist() for w in before], [
        w.tolist() for w in local_weights(strategy, variables)
    ]


def travel(strategy):
    """What each of three variables is while the weights travel, and after."""
    _, variables = make(strategy)
    first = strategy.cluster_resolver.task_id
    for variable in variables:
        for part in strategy.experimental_local_results(variable.value):
            part.assign(tf.fill(part.shape, 10.0 * first))
    on_the_way = travelling.Travel(variables, strategy)
    found = []
    for _ in range(3):
        with on_the_way.away():
            found.append([float(v.numpy().mean()) for v in variables])
        found.append([float(v.numpy().mean()) for v in variables])
    return found


def is_cluster():
    return "TF_CONFIG" in os.environ


def fit(strategy):
    """What `fit` with all callbacks says, and what it leaves behind."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.layers.Dense(5, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            tf_regtopk.DecentralizedOptimizer(keras.optimizers.Adam(0.05)),
            loss="mse",
            metrics=["mse"],
        )
    history = model.fit(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        epochs=2,
        verbose=0,
        callbacks=[
            tf_regtopk.ConsensusDistance(),
            tf_regtopk.SkewScout(
                tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
                metric="mse",
                periods=[1, 2],
            ),
            tf_regtopk.EvaluateAverage(
                tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
            ),
        ],
    ).history
    return {
        "history": history,
        "weights": [
            w.tolist()
            for w in local_weights(strategy, model.trainable_variables)
        ],
    }


def build_differently(strategy):
    """The error of workers with different topologies."""
    worker = strategy.cluster_resolver.task_id
    topology = RING if worker else tf_regtopk.Complete()
    try:
        make(strategy, topology=topology)
    except ValueError as error:
        return str(error)
    return None


def count_watched(strategy, take_step):
    """How many waits the watchdog has seen in steps of one exchange each."""
    watchdog = strategy.watchdog
    before = int(watchdog._entered.numpy())
    for g in gradients():
        take_step(g)
    assert int(watchdog._left.numpy()) == int(watchdog._entered.numpy())
    return int(watchdog._entered.numpy()) - before


def wait_for_a_lost_worker(strategy, take_step, result_path):
    """The error of the others when the last worker takes no more steps."""
    if strategy.cluster_resolver.task_id == N - 1:
        # It stays until the others have ended, because its end is an error.
        folder, deadline = pathlib.Path(result_path).parent, time.time() + 60
        while len([*folder.glob("result_*.json")]) < N - 1:
            if time.time() > deadline:
                break
            time.sleep(0.1)
        return None
    strategy.watchdog._timeout = 3.0
    try:
        for g in gradients():
            take_step(g)
    except tf.errors.DeadlineExceededError as error:
        return error.message
    return None


def main(result_path, *cases):
    # As in `logical_devices.py`.
    tf.data.experimental.enable_debug_mode()
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    optimizer, variables = make(strategy)
    try:
        strategy.run(
            lambda: optimizer.apply([tf.zeros(s) for s in SHAPES], variables)
        )
    except RuntimeError as error:
        eager = str(error)
    made = make_step(strategy)
    result = {
        "eager": eager,
        "cases": {case: train(strategy, **CASES[case]) for case in cases},
        "float64": train(
            strategy, dtype="float64", **CASES["clique gradients"]
        ),
        "bad gradient": train(strategy, gradients(is_bad=True), made),
        "loop": take_many_steps(strategy),
        "travel": travel(strategy),
        "fit": fit(strategy),
        "build_differently": build_differently(strategy),
        "watched": count_watched(strategy, made[0]),
        # Last, because no collective works after it.
        "lost": wait_for_a_lost_worker(strategy, made[0], result_path),
    }
    with open(result_path, "w") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
