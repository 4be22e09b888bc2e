"""Records of a user's own: what is wrong with them is said at once."""

import dataclasses
import json
from typing import ClassVar

import keras
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import hyper_parameters


class Own(tf_regtopk.TopK):
    """Needs no decorator, because it has no parameters."""

    selects_non_finite: ClassVar[bool] = False

    def score(self, a, memory, step):
        return a


@dataclasses.dataclass(frozen=True)
class WithParameter(Own):
    power: float = 2.0


def test_classes_that_need_no_more():
    assert Own(0.5).density == 0.5
    assert dataclasses.replace(WithParameter(0.5, 3.0), density=0.1) == (
        WithParameter(0.1, 3.0)
    )


def test_parameters_without_a_dataclass():
    class Annotated(Own):
        power: float = 2.0

    class Initialized(Own):
        def __init__(self, power):
            super().__init__(0.5)

    class Derived(Initialized):
        pass

    for make, received in (
        (lambda: Annotated(0.5), r"\['power'\]"),
        (lambda: Initialized(2.0), "`__init__`"),
        (lambda: Derived(2.0), "`__init__`"),
    ):
        with pytest.raises(
            TypeError,
            match="`(Annotated|Initialized)` must be a frozen dataclass.*"
            rf"write `@dataclasses.dataclass\(frozen=True\)`.*{received}",
        ):
            make()


def test_classes_that_keras_does_not_find_when_it_loads():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), WithParameter(0.5)
    )
    with pytest.warns(
        UserWarning, match="`WithParameter` should be registered by"
    ):
        config = keras.optimizers.serialize(optimizer)
    loaded = keras.optimizers.deserialize(
        config, custom_objects={"WithParameter": WithParameter}
    )
    assert loaded.sparsifier == WithParameter(0.5)


@keras.saving.register_keras_serializable(package="test")
@dataclasses.dataclass(frozen=True)
class Around(tf_regtopk.NoFeedback):
    """A rule around another one."""

    rule: tf_regtopk.ErrorFeedback


@pytest.mark.parametrize(
    "rule", [tf_regtopk.Accumulate(momentum=0.5), Around(tf_regtopk.EF21())]
)
def test_a_record_within_a_record_is_loaded(rule):
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), error_feedback=Around(rule)
    )
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    loaded = keras.optimizers.deserialize(config)
    assert loaded.error_feedback == Around(rule)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_the_library_s_own():
    hyper_parameters.warn_if_unregistered(
        tf_regtopk.RegTopK(),
        tf_regtopk.CompressedDownlink(tf_regtopk.LearnedShift()),
        tf_regtopk.Natural(),
        tf_regtopk.Hierarchical(),
        "float32",
    )


def test_a_memory_of_another_kind():
    class Forgetful(Own):
        def initial_memory(self, k, size, dtype):
            return (tf.zeros([k], dtype),)

        def remember(self, memory, indices, sent, total, step):
            return (indices,)

    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(), Forgetful(0.5)
    )
    variable = tf.Variable(tf.zeros([4]))
    with pytest.raises(
        ValueError,
        match=r"`Forgetful.remember` must return.*\['float32\(2,\)'\]. "
        r"Received: \['int32\(2,\)'\]",
    ):
        optimizer.apply([tf.ones([4])], [variable])
