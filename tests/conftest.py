"""Set-up shared by all tests, before TensorFlow makes its devices."""

import functools
import gc
import os

# Quieter, and the same CPU kernels in every run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Much of the tests' time is compiling for each device anew. What XLA itself
# makes of a program stays the same, only its machine code is less polished.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras
import pytest
import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

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


@pytest.fixture(autouse=True, scope="module")
def _cheap_garbage_collection():
    """Keeps the collector off what has been imported and what others keep.

    Else it goes through all of it time and again.
    """
    gc.collect()
    gc.freeze()


_iterators = []


@pytest.fixture(autouse=True, scope="session")
def _iterators_stay():
    """Keeps what `fit` reads from under a strategy until the process ends.

    TensorFlow 2.21 may free such an iterator while its thread still reads, and
    the process ends: once in about thirty calls of `fit` on a single device
    that is not the first, far less often on several devices.
    """
    init = multi_device_iterator_ops.OwnedMultiDeviceIterator.__init__

    def keep(self, *args, **kwargs):
        _iterators.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            multi_device_iterator_ops.OwnedMultiDeviceIterator, "__init__", keep
        )
        yield


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Every test starts with Keras's defaults and forgets its models."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@functools.cache
def _mirrored_strategy(num_replicas):
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


@pytest.fixture(scope="session")
def mirrored():
    """Function from a number of replicas to a strategy (0: no strategy)."""
    return _mirrored_strategy
