"""Checks of the machine: its devices and its software."""

from collections.abc import Iterator
import functools
import platform

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import gpus as gpus_lib
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError


def environment(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks TensorFlow's devices, and that XLA compiles for each device."""

    def versions() -> str:
        found: dict[str, str | None] = {**describe_software()}
        if devices.kind == "GPU":
            found["driver"] = gpus_lib.driver_version()
        return ", ".join(f"{name} {value}" for name, value in found.items())

    def compiles(device: str) -> None:
        numbers = np.arange(1000, dtype=np.float32)
        double = tf.function(lambda x: 2 * x, jit_compile=True, autograph=False)
        with tf.device(f"/{device}"):
            result = double(tf.identity(tf.constant(numbers)))
        place = trial_lib.device_name(result.device)
        if place != device:
            raise CheckError(f"a compiled function ran on {place}")
        trial_lib.expect_same(
            "doubled numbers", result.numpy(), 2 * numbers, "2x"
        )

    yield "versions", versions
    for device in devices.names:
        yield f"XLA on {device}", functools.partial(compiles, device)


def describe_software() -> dict[str, str]:
    """Returns the versions in use, by name."""
    found = {
        "tf_regtopk": tf_regtopk.__version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "Python": platform.python_version(),
    }
    build = tf.sysconfig.get_build_info()
    for name, key in (("CUDA", "cuda_version"), ("cuDNN", "cudnn_version")):
        if key in build:  # TensorFlow was built for these versions.
            found[name] = str(build[key])
    return found


def describe_gpus() -> list[str]:
    """Describes in words each GPU that TensorFlow sees."""
    found = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        name = details.get("device_name", "GPU")
        capability = details.get("compute_capability", ())
        found.append(f"{name} ({'.'.join(map(str, capability))})")
    return found
