"""Without the private parts of a step there is an error."""

import keras
import pytest
from tensorflow.python.distribute import cross_device_utils

import tf_regtopk


@pytest.mark.parametrize(
    "owner, name, path",
    [
        (
            keras.optimizers.Optimizer,
            "_all_reduce_sum_gradients",
            "_all_reduce_sum_gradients",
        ),
        (
            cross_device_utils.CollectiveReplicaLauncher,
            "_next_instance_key",
            "CollectiveReplicaLauncher._next_instance_key",
        ),
    ],
)
def test_an_upstream_without_a_part_is_refused(monkeypatch, owner, name, path):
    [defined_in] = [base for base in owner.__mro__ if name in vars(base)]
    monkeypatch.delattr(defined_in, name)
    with pytest.raises(
        RuntimeError,
        match=f"must have `[A-Za-z_.]+.{path}`.*Keras {keras.__version__}",
    ):
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())
