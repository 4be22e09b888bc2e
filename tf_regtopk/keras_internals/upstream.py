"""The check that Keras and TensorFlow have the private parts that are used."""

import operator

import keras
import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils
from tensorflow.python.ops import collective_ops

# What is looked up by name in upstream's classes and modules.
_NEEDED = (
    (keras.optimizers.Optimizer, "_all_reduce_sum_gradients"),
    (keras.optimizers.Optimizer, "_clip_gradients"),
    (cross_device_utils, "CollectiveKeys.get_group_key"),
    (cross_device_utils, "CollectiveKeys.get_instance_key"),
    (cross_device_utils, "CollectiveReplicaLauncher.batch_all_reduce"),
    (cross_device_utils, "CollectiveReplicaLauncher._next_instance_key"),
    (cross_device_utils, "CollectiveReplicaLauncher._get_ordering_token"),
    (collective_ops, "all_gather_v2"),
    (collective_ops, "all_to_all_v2"),
)


def check_upstream() -> None:
    """Raises if Keras or TensorFlow lacks a part that a step relies on.

    Raises:
        RuntimeError: If a part is missing. Without the first of them gradients
            would be summed twice.
    """
    for owner, path in _NEEDED:
        try:
            operator.attrgetter(path)(owner)
        except AttributeError:
            raise RuntimeError(
                "The installed Keras or TensorFlow must have "
                f"`{owner.__name__}.{path}`, which `tf_regtopk` relies on. "
                "Install versions of the table in README.md, or a newer "
                f"`tf_regtopk`. Received: Keras {keras.__version__}, "
                f"TensorFlow {tf.__version__}"
            ) from None
