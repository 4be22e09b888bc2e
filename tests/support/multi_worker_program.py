"""The program of `test_multi_worker.py`, on every worker."""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import collectives
from tf_regtopk.kernels import words


def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(69, 8)).astype("float32")
    y = np.argmax(x[:, :3] + 0.1 * rng.normal(size=(69, 3)), axis=1)
    return x, np.eye(3, dtype="float32")[y]


def make_dataset(x, y, batch_size=16):
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(len(x), seed=1).batch(batch_size)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options)


def batches(strategy, dataset):
    """The part of every batch that each local replica gets."""
    result = [[] for _ in strategy.extended.worker_devices]
    for x, _ in strategy.experimental_distribute_dataset(dataset):
        for i, part in enumerate(strategy.experimental_local_results(x)):
            result[i].append(part.numpy().tolist())
    return result


def train(strategy):
    """Goes through `fit`, `evaluate` and `predict` and returns the results."""
    keras.utils.set_random_seed(0)
    x, y = make_data()
    dataset = make_dataset(x[:64], y[:64])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.layers.Dense(16, activation="relu"),
                keras.layers.Dense(3),
            ]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.2, momentum=0.9),
                sparsifier=tf_regtopk.RegTopK(density=0.1),
                # Payloads of different lengths, rounded by each replica.
                codec=tf_regtopk.Codec("golomb", "natural"),
                telemetry=True,
            ),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
            # The result of the last one is a vector.
            metrics=["accuracy", keras.metrics.F1Score()],
        )
    history = model.fit(
        dataset,
        validation_data=(x[:37], y[:37]),
        validation_batch_size=8,
        epochs=3,
        callbacks=[tf_regtopk.DensityWarmup((0.3,)), tf_regtopk.Monitor()],
        shuffle=False,
        verbose=0,
    )
    return {
        "batches": batches(strategy, dataset),
        "history": {
            k: np.array(v).tolist() for k, v in history.history.items()
        },
        # 37 = 4 * 8 + 5: the last batch splits into 3 and 2.
        "evaluate": {
            k: np.array(v).tolist()
            for k, v in model.evaluate(
                x[:37], y[:37], batch_size=8, verbose=0, return_dict=True
            ).items()
        },
        # The last batch of 1 leaves a replica without any.
        "predict": {
            n: model.predict(x[:n], batch_size=8, verbose=0).tolist()
            for n in (37, 33)
        },
        "weights": [w.tolist() for w in model.get_weights()],
    }


class AnyInputs(keras.Model):
    """Notes the dtypes of its inputs, whatever they are."""

    def __init__(self):
        super().__init__()
        self.lookup = keras.layers.StringLookup(
            vocabulary=["a", "b"], output_mode="one_hot"
        )
        self.dense = keras.layers.Dense(3)
        self.seen = set()

    def call(self, inputs):
        for name, value in inputs.items():
            self.seen.add((name, keras.backend.standardize_dtype(value.dtype)))
        image = keras.ops.cast(inputs["image"], "float32") / 255.0
        flag = keras.ops.cast(inputs["flag"], "float32")
        token = keras.ops.one_hot(inputs["token"], 5)
        return self.dense(
            keras.ops.concatenate(
                [image, flag, token, self.lookup(inputs["word"])], axis=-1
            )
        )


def train_on_any_inputs(strategy):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = {
        "image": rng.integers(0, 256, size=(32, 4), dtype="uint8"),
        "flag": rng.integers(0, 2, size=(32, 1)).astype("bool"),
        "token": rng.integers(0, 5, size=32, dtype="int32"),
        "word": tf.constant(rng.choice(["a", "b", "c"], size=(32, 1))),
    }
    y = rng.integers(0, 3, size=32, dtype="int16")
    with strategy.scope():
        model = AnyInputs()
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    history = model.fit(x, y, batch_size=8, epochs=1, verbose=0).history
    return {"history": history, "seen": sorted(model.seen)}


def reduce_values(strategy):
    """Results of `strategy.reduce()`, as pairs of dtype and value."""

    def per_replica(*values, dtype):
        """The value on each replica."""
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                values[context.replica_id_in_sync_group], dtype
            )
        )

    def plain(structure):
        return tf.nest.map_structure(
            lambda t: [t.dtype.name, np.array(t).astype(object).tolist()],
            structure,
        )

    scalar = per_replica(1.0, 4.0, dtype="float32")
    vector = per_replica([1.0, 2.0], [4.0, 9.0], dtype="float32")
    int32 = per_replica([1, 2], [2, 2], dtype="int32")
    uint8 = per_replica([250, 2], [251, 4], dtype="uint8")
    flag = per_replica([False, True], [False, False], dtype="bool")
    uint32 = per_replica([2**32 - 1], [2**32 - 3], dtype="uint32")

    @tf.function
    def in_graph(value):
        return strategy.reduce("MEAN", value, axis=0)

    word = strategy.reduce(
        "MEAN", (per_replica(["a"], ["b"], dtype="string"),), axis=None
    )[0]
    mean = tf.distribute.ReduceOp.MEAN
    return {
        "nested": plain(
            strategy.reduce(
                mean, ({"b": vector, "a": (scalar,)}, int32, uint8), axis=None
            )
        ),
        "nested axis 0": plain(
            strategy.reduce("sum", {"a": scalar, "b": vector}, axis=0)
        ),
        "scalar": plain(strategy.reduce("MEAN", scalar, axis=0)),
        "scalar sum": plain(strategy.reduce("SUM", scalar, axis=0)),
        "scalar in graph": plain(in_graph(scalar)),
        "scalar tensor": plain(strategy.reduce("MEAN", tf.constant(2.0), 0)),
        "float": plain(strategy.reduce("SUM", 2.0, axis=None)),
        "vector": plain(strategy.reduce("MEAN", vector, axis=0)),
        "int32": plain(strategy.reduce("MEAN", int32, axis=None)),
        "uint8": plain(strategy.reduce("MEAN", uint8, axis=None)),
        "uint32": plain(strategy.reduce("MEAN", uint32, axis=None)),
        "bool": plain(strategy.reduce("MEAN", flag, axis=None)),
        "string": word.numpy()[0].decode(),
    }


def gather(strategy):
    """What is gathered of different payloads, and by which collectives."""

    def gather_numbers(numbers):
        gathered = collectives.all_gather(words.hold(numbers))
        return words.release(gathered, tf.int32)

    @tf.function
    def gather_on_replicas(numbers):
        return strategy.run(gather_numbers, args=(numbers,))

    numbers = strategy.experimental_distribute_values_from_function(
        lambda context: tf.range(5) + 100 * context.replica_id_in_sync_group
    )
    gathered = [gather_on_replicas(numbers).numpy().tolist() for _ in range(3)]
    graph = gather_on_replicas.get_concrete_function(numbers).graph
    return {
        "gathered": gathered,
        "collectives": [
            op.type
            for op in graph.get_operations()
            if op.type.startswith("Collective")
        ],
        "eager": strategy.run(gather_numbers, args=(numbers,)).numpy().tolist(),
    }


def build_differently(strategy):
    """The errors of optimizers that were given other arguments elsewhere."""
    worker = strategy.cluster_resolver.task_id
    # What is one argument on the first worker, and another on the second.
    pairs = {
        "codec": [
            dict(codec=tf_regtopk.Codec(values=values))
            for values in ("bfloat16", "float16")
        ],
        "sparsifier": [
            dict(sparsifier=tf_regtopk.RegTopK(0.5, mu=mu)) for mu in (1, 2)
        ],
        "density": [
            dict(sparsifier=tf_regtopk.RegTopK(density))
            for density in (0.5, 0.25)
        ],
        "error_feedback": [
            dict(error_feedback=tf_regtopk.LearnedShift(rate))
            for rate in (0.5, 0.25)
        ],
        "inner_optimizer": [dict(momentum=m) for m in (0.0, 0.9)],
        "telemetry": [dict(telemetry=has) for has in (False, True)],
        "equal": [dict(), dict()],
    }
    errors = {}
    for name, arguments in pairs.items():
        arguments = arguments[worker]
        momentum = arguments.pop("momentum", 0.0)
        if worker and name == "equal":
            keras.optimizers.SGD()  # The next one has another name.
        with strategy.scope():
            variable = keras.Variable(np.zeros(4, "f4"))
            optimizer = tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1, momentum), **arguments
            )
            try:
                optimizer.build([variable])
            except ValueError as e:
                errors[name] = str(e)
    return errors


def upstream_error(strategy):
    """The error of `fit` with upstream's `reduce`. `None` if there is none."""
    upstream = tf.distribute.MultiWorkerMirroredStrategy.reduce
    strategy.reduce = lambda *args, **kwargs: upstream(
        strategy, *args, **kwargs
    )
    x, y = make_data()
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile(optimizer="sgd", loss="mse", metrics=["accuracy"])
    try:
        model.fit(x[:64], y[:64], batch_size=16, verbose=0)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def main(result_path):
    # As in `logical_devices.py`.
    tf.data.experimental.enable_debug_mode()
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(timeout_seconds=60)
    result = {
        "num_replicas": strategy.num_replicas_in_sync,
        "reduce": reduce_values(strategy),
        "gather": gather(strategy),
        "train": train(strategy),
        "any_inputs": train_on_any_inputs(strategy),
        "build_differently": build_differently(strategy),
        # Last, as it leaves the strategy as upstream has it.
        "upstream_error": upstream_error(strategy),
    }
    with open(result_path, "w") as f:
        json.dump(result, f)
    sys.stdout.flush()
    # Not through TensorFlow's shutdown, which may wait for other workers.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
