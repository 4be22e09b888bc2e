"""Private parts of how TensorFlow traces, compiles and starts variables."""

from collections.abc import Iterator
import contextlib

import tensorflow as tf
from tensorflow.python.framework import config
from tensorflow.python.ops import control_flow_util


def in_xla_context() -> bool:
    """Returns whether XLA will compile the code being traced as a whole."""
    return control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def is_op_determinism_enabled() -> bool:
    """Returns whether TensorFlow's `enable_op_determinism` was called."""
    return config.is_op_determinism_enabled()


@contextlib.contextmanager
def initial_values_of_each_worker() -> Iterator[None]:
    """Keeps the initial values of new variables on the worker that made them.

    Otherwise the first worker sends its initial values to all workers. 44 MB of
    values take 3.5 s at 100 Mbit/s and hold up the heartbeats meanwhile;
    TensorFlow takes a worker for lost after 10 s without a heartbeat.
    """
    extended = tf.distribute.get_strategy().extended
    num_workers = getattr(extended, "_num_workers", None)
    if num_workers is None:
        yield
        return
    extended._num_workers = 1
    try:
        yield
    finally:
        extended._num_workers = num_workers
