"""Which variables are exchanged densely, or at a density of their own."""

import re

import keras
import numpy as np
import pytest

from tf_regtopk.steps import variable_rules


def make_variables():
    """The variables of an embedding, of layers and of a normalisation."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Embedding(7, 5, name="tokens"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(4, name="head"),
        ]
    )
    return model.trainable_variables


def paths_of(slots, variables):
    return ["/".join(variables[slot].path.split("/")[-2:]) for slot in slots]


@pytest.mark.parametrize(
    "arguments, sparse, own, dense",
    [
        (
            {},
            [
                "tokens/embeddings",
                "norm/gamma",
                "norm/beta",
                "head/kernel",
                "head/bias",
            ],
            (),
            [],
        ),
        (
            dict(dense=["bias", "*norm/*"]),
            ["tokens/embeddings", "head/kernel"],
            (),
            ["norm/gamma", "norm/beta", "head/bias"],
        ),
        (
            # The variables of an own density come last.
            dict(
                dense=lambda v: len(v.shape) == 1,
                densities={"*tokens/*": 0.5, "embeddings": 0.25},
            ),
            ["head/kernel", "tokens/embeddings"],
            (0.5,),
            ["norm/gamma", "norm/beta", "head/bias"],
        ),
        (
            dict(dense_below=5, dense=["gamma"], densities={"bias": 1}),
            ["tokens/embeddings", "norm/beta", "head/kernel"],
            (),
            ["norm/gamma", "head/bias"],
        ),
    ],
)
def test_slots(arguments, sparse, own, dense):
    variables = make_variables()
    slots = variable_rules.VariableRules(**arguments).slots(variables)
    assert paths_of(slots.sparse, variables) == sparse
    assert slots.own_densities == own
    assert slots.num_default == len(sparse) - len(own)
    assert paths_of(slots.dense, variables) == dense


def test_a_path_with_and_without_the_name_of_the_model():
    """`Sequential` loses its own name when Keras loads the model."""
    layer = keras.layers.Dense(2, name="inside")
    layer.build((3, 2))
    model = keras.Sequential(name="around")
    model.add(keras.Input([3]))
    model.add(keras.layers.Dense(2, name="inside"))
    paths = [layer.kernel.path, model.layers[0].kernel.path]
    assert paths[0] == "inside/kernel"
    rules = variable_rules.VariableRules(dense=["*/inside/kernel"])
    for variable in (layer.kernel, model.layers[0].kernel):
        assert rules.slots([variable]).dense == (0,)


@pytest.mark.parametrize("argument", ["dense", "densities"])
def test_a_pattern_must_match(argument):
    patterns = {"bias": 0.5, "biases": 0.5}
    if argument == "dense":
        patterns = list(patterns)
    rules = variable_rules.VariableRules(**{argument: patterns})
    with pytest.raises(
        ValueError,
        match=f"pattern of `{argument}` must match .*Received: 'biases' for "
        r".*head/bias",
    ):
        rules.slots(make_variables())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(dense="bias"), TypeError, r"`dense` must be given patterns"),
        (dict(dense=[1]), TypeError, r"`dense` must be given patterns"),
        (dict(densities=["bias"]), TypeError, "`densities` must be a dict"),
        (dict(densities={"bias": 0}), ValueError, r"all in \(0, 1\]"),
        (dict(dense_below=-1), ValueError, "`dense_below` must be an integer"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        variable_rules.VariableRules(**arguments)


def test_what_cannot_be_summed_is_in_no_slot():
    empty = keras.Variable(np.zeros((0, 3), "float32"))
    scale = keras.Variable(1.0)
    scale.overwrite_with_gradient = True
    slots = variable_rules.VariableRules(dense_below=99).slots([empty, scale])
    assert slots == ((), (), ())


@pytest.mark.parametrize("answer", [["bias"], "no", np.array([True, False])])
def test_a_function_that_does_not_say_yes_or_no(answer):
    rules = variable_rules.VariableRules(0, lambda _: answer, {})
    with pytest.raises(TypeError, match="`dense` must return True or False"):
        rules.slots(make_variables())


def test_a_function_may_return_a_match():
    rules = variable_rules.VariableRules(
        0, lambda v: re.search("bias", v.path), {}
    )
    variables = make_variables()
    assert paths_of(rules.slots(variables).dense, variables) == ["head/bias"]


@pytest.mark.parametrize("dense", [None, 5])
def test_dense_that_is_no_list(dense):
    with pytest.raises(TypeError, match="`dense` must be given patterns"):
        variable_rules.VariableRules(dense=dense)
