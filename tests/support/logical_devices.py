"""Logical devices of a process of tests, made before TensorFlow starts."""

import functools
import os

# Quieter, and the same CPU kernels in every run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pytest
import tensorflow as tf

# Much of the tests' time is compiling for each device anew. What XLA itself
# makes of a program stays the same, only its machine code is less polished; the
# self-test runs on the machine code of users.
_FLAGS = "--xla_backend_optimization_level=0"
# XLA ends a process for a flag that it does not know, as newer ones may not.
if tf.version.VERSION.startswith(("2.20.", "2.21.")):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
    _FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

NUM_DEVICES = 8

# The devices of the fixtures: "CPU", or "GPU" where there is one.
DEVICE_TYPE = os.environ.get("TF_REGTOPK_TEST_DEVICES", "CPU")
# Megabytes of each logical GPU, so that several processes share a card.
GPU_MEMORY = 1500


def split(device, num_parts, **kwargs):
    """Makes several logical devices of a physical one."""
    tf.config.set_logical_device_configuration(
        device, [tf.config.LogicalDeviceConfiguration(**kwargs)] * num_parts
    )


# Logical devices are fixed once for the whole process; strategies take the
# first few of them.
split(tf.config.list_physical_devices("CPU")[0], NUM_DEVICES)
if DEVICE_TYPE != "CPU":
    gpus = tf.config.list_physical_devices(DEVICE_TYPE)
    if not gpus:
        raise pytest.UsageError(
            '`TF_REGTOPK_TEST_DEVICES` must be "CPU" where TensorFlow sees no '
            f"other device of that type. Received: {DEVICE_TYPE!r}"
        )
    for gpu in gpus:
        split(gpu, -(-NUM_DEVICES // len(gpus)), memory_limit=GPU_MEMORY)
# tf.data's background threads can starve beside many replicas on few cores.
tf.data.experimental.enable_debug_mode()
tf.get_logger().setLevel("WARNING")


@functools.cache
def mirrored_strategy(num_replicas):
    """A strategy of this process (0 replicas: no strategy)."""
    if num_replicas == 0:
        return tf.distribute.get_strategy()
    # TensorFlow's collectives allow one group of devices and one strategy on it
    # in a process: pairs use them, other numbers reduce on one device.
    return tf.distribute.MirroredStrategy(
        [f"{DEVICE_TYPE}:{i}" for i in range(num_replicas)],
        cross_device_ops=None
        if num_replicas == 2
        else tf.distribute.ReductionToOneDevice(),
    )
