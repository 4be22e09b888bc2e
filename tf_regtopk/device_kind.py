"""The kind of device that programs are compiled for.

Results are the same on every kind. Some forms of a computation suit only one.
"""

import contextlib

import tensorflow as tf

_forced = []


def is_gpu():
    """Whether what is traced now is to run on a GPU.

    Without a strategy, whether there is one.
    """
    if _forced:
        return _forced[-1] == "GPU"
    if not tf.distribute.has_strategy():
        return bool(tf.config.list_logical_devices("GPU"))
    # There may be a GPU that the replicas do not use.
    devices = tf.distribute.get_strategy().extended.worker_devices
    types = {tf.DeviceSpec.from_string(d).device_type for d in devices}
    return types == {"GPU"}


@contextlib.contextmanager
def compile_for(kind):
    """For programs that are traced here, and run elsewhere.

    Args:
        kind: "CPU" or "GPU".

    Example:

    >>> with compile_for("GPU"):
    ...     is_gpu()
    True
    """
    _forced.append(kind)
    try:
        yield
    finally:
        _forced.pop()
