"""The kind of device that programs are compiled for.

Some forms of a computation suit only one kind. The results are the same on
all, but for the rounding of sums over three or more replicas (`scatter_sum`).
"""

from collections.abc import Iterator
import contextlib
import os
from typing import Literal
import warnings

import tensorflow as tf

from tf_regtopk import keras_internals

_forced: list[str] = []
# XLA's flag for scatters that are deterministic without a loop.
_PARALLEL_SCATTERS = "--xla_gpu_enable_scatter_determinism_expander=true"


def is_gpu() -> bool:
    """Returns whether the program that is traced now will run on a GPU.

    Without a strategy it will wherever there is a GPU.
    """
    if _forced:
        return _forced[-1] == "GPU"
    if not tf.distribute.has_strategy():
        return bool(tf.config.list_logical_devices("GPU"))
    # The devices of the strategy count, because there may be a GPU that the
    # replicas do not use.
    devices = tf.distribute.get_strategy().extended.worker_devices
    types = {tf.DeviceSpec.from_string(d).device_type for d in devices}
    return types == {"GPU"}


def warn_of_serial_scatters() -> None:
    """Warns where XLA would run scatters one entry after the other.

    XLA does so on GPUs under TensorFlow's op determinism, unless a flag tells
    otherwise (benchmarks/with_jax/compile_for_gpu.py --deterministic).
    """
    if (
        is_gpu()
        and keras_internals.is_op_determinism_enabled()
        and _PARALLEL_SCATTERS not in os.environ.get("XLA_FLAGS", "")
    ):
        warnings.warn(
            "With `tf.config.experimental.enable_op_determinism()` a step on "
            "GPUs takes seconds, because XLA adds entries one after the other. "
            f"Set XLA_FLAGS={_PARALLEL_SCATTERS} before TensorFlow is "
            "imported; or leave determinism off for this optimizer, whose "
            "replicas and runs agree to the bit without it, as no two entries "
            "of a scatter meet.",
            stacklevel=2,
        )


@contextlib.contextmanager
def compile_for(kind: Literal["CPU", "GPU"]) -> Iterator[None]:
    """Sets the device kind of programs that are traced here, and run elsewhere.

    Args:
        kind: Kind of device that `is_gpu` answers for.

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
