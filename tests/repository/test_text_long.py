"""The study of text, shortened."""

import doctest
import types

import example_runner
import keras
import numpy as np
import text_long

SMALL = dict(length=8, width=8, blocks=1)


def test_examples_of_docstrings():
    results = doctest.testmod(text_long)
    assert results.attempted > 0
    assert results.failed == 0


def test_no_position_sees_what_comes_after():
    keras.utils.set_random_seed(0)
    model = text_long.build_model(types.SimpleNamespace(**SMALL))
    assert not model.non_trainable_variables
    rng = np.random.default_rng(0)
    one = rng.integers(text_long.NUM_SYMBOLS, size=(1, 8))
    other = one.copy()
    other[0, 5] = (one[0, 5] + 1) % text_long.NUM_SYMBOLS
    a, b = (np.asarray(model(x)) for x in (one, other))
    assert a.shape == (1, 8, text_long.NUM_SYMBOLS)
    np.testing.assert_allclose(a[0, :5], b[0, :5], rtol=1e-4, atol=1e-6)
    assert (abs(a[0, 5:] - b[0, 5:]).max(axis=1) > 1e-4).all()


def test_task():
    args = types.SimpleNamespace(**SMALL | {"length": 64}, max_files=200)
    task = text_long.load(args)
    inputs, targets = task.images.numpy(), task.labels
    assert inputs.shape == targets.shape == (len(task.classes), 64)
    # The next character of each.
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.min() >= 0 and inputs.max() < text_long.NUM_SYMBOLS
    classes = np.unique(task.classes)
    assert 1 < len(classes) <= text_long.NUM_CLASSES
    # Some of all folders are held out.
    assert task.held_out == 1000
    assert {*task.classes[-1000:]} == {*classes}
    assert len(task.classes_to_train_on) == len(inputs) - 1000
    assert len(task.test[0]) == len(task.test[1]) == 1000
    # Whole files are kept for the test.
    seen = {row.tobytes() for row in inputs}
    assert sum(row.tobytes() in seen for row in task.test[0]) < 50


def test_largest_folders_are_classes():
    folders = ["a"] * 3 + [f"b{i}" for i in range(20)] + ["c"] * 2
    classes = text_long.classes_of(folders)
    assert {*classes[:3]} == {0} and {*classes[-2:]} == {1}
    assert len(np.unique(classes)) == text_long.NUM_CLASSES
    # Those of one example each, but for seven, are together.
    assert (classes == text_long.NUM_CLASSES - 1).sum() == 20 - 7


def test_script(tmp_path):
    summary, output = example_runner.run_example(
        "studies/text_long",
        tmp_path,
        **SMALL,
        max_files=20,
        methods="dense,shift_regtopk_sign",
        num_workers=2,
        batch_size=2,
        rounds=2,
        evaluate_every=2,
        learning_rates="0.01",
        split="dirichlet:1",
        density=0.01,
    )
    assert summary["config"]["inner_optimizer"] == "adam"
    dense, signs = summary["methods"].values()
    for method in (dense, signs):
        [accuracy] = method["runs"]["0"]["accuracy"]
        assert 0 <= accuracy <= 1
    dense, signs = (m["runs"]["0"]["bytes_a_step"] for m in (dense, signs))
    assert signs < dense / 10
    assert "transformer, 2 workers, dirichlet:1" in output
