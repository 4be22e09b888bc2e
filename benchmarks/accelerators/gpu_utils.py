"""What the benchmarks of GPUs share: devices, their memory, and results."""

import json
import os
import platform
import subprocess

import tensorflow as tf


def replica_devices(kind, count, memory_mb=None):
    """Names of devices for replicas; splits the first one if there are few.

    To be called before TensorFlow has run anything.

    Args:
        kind: "GPU" or "CPU".
        count: Number of devices.
        memory_mb: Of a GPU that is split, megabytes for each part. Defaults to
            what is free, as `nvidia-smi` says, but for a tenth.

    Returns:
        List of names.
    """
    physical = tf.config.list_physical_devices(kind)
    if not physical:
        raise ValueError(
            f"There must be a {kind} that TensorFlow sees. Received: "
            f"{tf.config.list_physical_devices()}"
        )
    if len(physical) < count:
        if kind == "GPU" and memory_mb is None:
            memory_mb = int(0.9 * _free_memory_mb() / count)
        part = tf.config.LogicalDeviceConfiguration(
            memory_limit=memory_mb if kind == "GPU" else None
        )
        tf.config.set_logical_device_configuration(physical[0], [part] * count)
    return [f"{kind}:{i}" for i in range(count)]


def _free_memory_mb():
    output = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return int(output.splitlines()[0].split()[0])


def describe(devices):
    """What some replicas' devices are, and how they exchange."""
    kind = devices[0].split(":")[0]
    physical = tf.config.list_physical_devices(kind)
    if len(devices) == 1:
        return f"1 {kind}"
    # As `tf.distribute.MirroredStrategy` decides.
    if len(physical) < len(tf.config.list_logical_devices(kind)):
        return f"{len(devices)} parts of one {kind}, RING"
    return f"{len(devices)} {kind}s, NCCL"


def machine():
    """What is to be known of the machine that gave some results."""
    return {
        "gpus": [
            tf.config.experimental.get_device_details(gpu).get("device_name")
            for gpu in tf.config.list_physical_devices("GPU")
        ],
        "processor": platform.machine(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
    }


def synchronize():
    """Waits until all GPUs have done what they were told to."""
    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()


def memory_in_use(device, reset=False):
    """`(bytes now, most bytes since the reset)`, or None of a CPU."""
    if not device.startswith("GPU"):
        return None
    if reset:
        tf.config.experimental.reset_memory_stats(device)
    info = tf.config.experimental.get_memory_info(device)
    return info["current"], info["peak"]


def write(output_dir, results):
    """Writes `summary.json`, and returns its path."""
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(results, f, indent=2)
    return path
