"""A measurement of the time and the memory of a step."""

from collections.abc import Iterator
import functools
import gc
import statistics
import time
from typing import Literal

import keras
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError


def speed(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Measures the time and the memory of a step."""
    strategies = {
        "first device": devices.one,
        f"{len(devices.names)} replicas": devices.all,
    }
    for name, strategy in strategies.items():
        for method in ("sparse", "dense", "unwrapped"):
            if method == "dense" and strategy is devices.one:
                continue  # One replica exchanges nothing.
            yield (
                f"{method}, {name}",
                functools.partial(
                    measure, strategy, method, devices.size, devices.quick
                ),
            )


def measure(
    strategy: tf.distribute.Strategy,
    method: Literal["sparse", "dense", "unwrapped"],
    size: int,
    quick: bool,
) -> str:
    """Times steps without reading anything back in between."""
    gc.collect()
    before = _memory(strategy, "current", reset=True)
    rows = size // 1000
    shapes = [(rows, 999), (size - rows * 999,)]
    with strategy.scope():
        variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
        optimizer = keras.optimizers.SGD(0.1)
        if method != "unwrapped":
            optimizer = tf_regtopk.SparsifiedOptimizer(
                optimizer, tf_regtopk.RegTopK(0.001), exchange=method
            )
        optimizer.build(variables)

    def make_gradient() -> tf.Tensor:
        def make() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            replica = tf.convert_to_tensor(context.replica_id_in_sync_group)
            return tf.random.stateless_normal([size], [7, replica])

        return strategy.run(make)

    step = trial_lib.step_function(strategy, optimizer, variables)
    gradient = tf.function(make_gradient, autograph=False)()

    def wait() -> list[float]:
        return [
            float(value[-1].numpy())
            for value in strategy.experimental_local_results(
                variables[-1].value
            )
        ]

    wait()
    start = time.perf_counter()
    step(gradient)
    wait()
    first = time.perf_counter() - start
    for _ in range(3):
        step(gradient)
    wait()
    seconds, num_steps = [], 2 if quick else 10
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(num_steps):
            step(gradient)
        wait()
        seconds.append((time.perf_counter() - start) / num_steps)
    taken = int(optimizer.iterations.numpy())
    if taken != 4 + 3 * num_steps:
        raise CheckError(f"{taken} of {4 + 3 * num_steps} steps were taken")
    for variable in variables:
        first_replica, *others = strategy.experimental_local_results(
            variable.value
        )
        for other in others:
            trial_lib.expect_same(
                "weights",
                other.numpy(),
                first_replica.numpy(),
                "those of replica 0",
            )
    found = (
        f"J = {size}: first call {first:.1f} s, then "
        f"{1e3 * statistics.median(seconds):.2f} ms a step"
    )
    peak = _memory(strategy, "peak")
    if peak is not None and before is not None:
        gradients = (peak - before) / (4 * size)
        found += f", peak memory {gradients:.1f} gradients"
    return found


def _memory(
    strategy: tf.distribute.Strategy,
    what: Literal["current", "peak"],
    reset: bool = False,
) -> int | None:
    """Returns the bytes in use on the first device, None for a CPU."""
    device = trial_lib.device_name(strategy.extended.worker_devices[0])
    if device.startswith("CPU"):
        return None
    if reset:
        tf.config.experimental.reset_memory_stats(device)
    return tf.config.experimental.get_memory_info(device)[what]
