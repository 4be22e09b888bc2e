"""What a file says of a record is compared across versions."""

import copy
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.saving import saved_config
from tf_regtopk.saving import saved_state

RULE = tf_regtopk.CompressedDownlink(
    tf_regtopk.EF21(momentum=0.5),
    codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(3)),
)


@pytest.mark.parametrize(
    "record", [RULE, tf_regtopk.RegTopK(0.25, mu=3), tf_regtopk.Dense()]
)
def test_a_record_fits_its_own_description(record):
    description = saved_config.describe(record)
    assert saved_config.complete(description, record) == description
    other = dataclasses.replace(record)
    assert saved_config.describe(other) == description


def as_version_0_1_0_wrote(record):
    """The class by its bare name, and modules within the configuration."""
    config = keras.saving.serialize_keras_object(record)["config"]
    return [type(record).__name__, copy.deepcopy(config)]


def test_modules_may_move():
    saved = as_version_0_1_0_wrote(RULE)
    assert saved[1]["error_feedback"]["module"].startswith("tf_regtopk.")
    saved[1]["error_feedback"]["module"] = "tf_regtopk.elsewhere"
    saved[1]["codec"]["module"] = "tf_regtopk.elsewhere"
    expected = saved_config.describe(RULE)
    assert saved_config.complete(saved, RULE) == expected


@pytest.mark.parametrize(
    "name",
    [
        "Accumulate",
        "AllGather",
        "AllReduce",
        "BFloat16",
        "Codec",
        "CompressedDownlink",
        "Dense",
        "EF21",
        "Float16",
        "Float32",
        "Hierarchical",
        "LearnedShift",
        "LocalAdam",
        "LossScaleOptimizer",
        "Natural",
        "NoFeedback",
        "RandomK",
        "RegTopK",
        "ScaledSign",
        "SparsifiedOptimizer",
        "TopK",
        "Uniform",
    ],
)
def test_names_in_files_do_not_depend_on_modules(name):
    found = keras.saving.get_registered_object(f"tf_regtopk>{name}")
    assert found is getattr(tf_regtopk, name)


def test_new_hyper_parameters_count_as_their_defaults():
    record = tf_regtopk.RegTopK(0.25)
    saved = saved_config.describe(record)
    del saved[1]["q"], saved[1]["denominator"]
    expected = saved_config.describe(record)
    assert saved_config.complete(saved, record) == expected
    other = tf_regtopk.RegTopK(0.25, q=5.0)
    assert saved_config.complete(saved, other) != saved_config.describe(other)
    # Also within another record.
    saved = saved_config.describe(RULE)
    del saved[1]["error_feedback"][1]["momentum"]
    assert saved_config.complete(saved, RULE) != saved_config.describe(RULE)
    plain = tf_regtopk.CompressedDownlink(tf_regtopk.EF21())
    saved = saved_config.describe(plain)
    del saved[1]["error_feedback"][1]["momentum"]
    del saved[1]["codec"]
    expected = saved_config.describe(plain)
    assert saved_config.complete(saved, plain) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.__setitem__(0, "other>CompressedDownlink"),
        lambda saved: saved[1].update(density=0.5),
        lambda saved: saved[1]["error_feedback"][1].update(momentum=0.25),
        lambda saved: saved[1].update(unknown=1),
    ],
)
def test_another_configuration_does_not_fit(change):
    saved = saved_config.describe(RULE)
    change(saved)
    assert saved_config.complete(saved, RULE) != saved_config.describe(RULE)


def make_optimizer():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(1.0), tf_regtopk.TopK(0.5), error_feedback=RULE
    )
    optimizer.build([tf.Variable(tf.zeros([4]))])
    return optimizer


def test_state_of_version_0_1_0_with_nested_rules_loads():
    """Whose modules have been moved since."""
    optimizer = make_optimizer()
    saved = optimizer.save_state()
    old = as_version_0_1_0_wrote(RULE)
    old[1]["codec"]["module"] = "tf_regtopk.elsewhere"
    layout = {
        **saved.layout,
        "error_feedback": old,
        "sparsifier": as_version_0_1_0_wrote(tf_regtopk.TopK(0.5)),
    }
    make_optimizer().load_state(saved._replace(layout=layout))
    layout["sparsifier"] = as_version_0_1_0_wrote(tf_regtopk.TopK(0.25))
    with pytest.raises(ValueError, match="an optimizer with sparsifier="):
        make_optimizer().load_state(saved._replace(layout=layout))


def test_a_newer_format_says_what_reads_it(monkeypatch):
    saved = make_optimizer().save_state()
    monkeypatch.setattr(saved_state, "_FORMAT", 99)
    arrays = saved_state.to_arrays(saved)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=f"tf_regtopk {tf_regtopk.__version__} or newer"
    ):
        saved_state.from_arrays(arrays)
    loaded, _ = saved_state.from_arrays(saved_state.to_arrays(saved))
    assert loaded.layout == saved.layout
    np.testing.assert_equal(loaded.replicas, saved.replicas)


def test_a_sparsifier_without_a_density_takes_up_any():
    """Version 0.1.0 saved 0.001 for it."""
    saved = ["TopK", {"density": 0.001}]
    record = tf_regtopk.TopK()
    assert saved_config.complete(saved, record) == saved_config.describe(record)
    given = tf_regtopk.TopK(0.01)
    assert saved_config.complete(saved, given) != saved_config.describe(given)


def test_programs_that_differ_in_names_only_are_equal():
    def describe(momentum=0.9):
        config = keras.saving.serialize_keras_object(
            keras.optimizers.SGD(
                keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9),
                momentum,
            )
        )
        return saved_config.without_names(config)

    assert describe() == describe()
    assert describe() != describe(0.8)
    assert saved_config.without_names(
        keras.saving.serialize_keras_object(lambda x: x)
    ) == saved_config.without_names(
        keras.saving.serialize_keras_object(lambda y: y)
    )
