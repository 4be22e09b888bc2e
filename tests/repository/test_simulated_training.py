"""Long trainings of simulated workers: the steps of the strategy, resumed."""

import json
import types

import example_runner
import image_training
import keras
import numpy as np
import old_versions
import pytest
import simulated_training
import tensorflow as tf
import training_programs

RATE, SEED = 0.1, 3
ARGS = types.SimpleNamespace(
    num_workers=2,
    batch_size=4,
    rounds=6,
    tuning_rounds=2,
    evaluate_every=2,
    schedule="constant",
    look_ahead="none",
    density_phases=1,
    warm_up=0.0,
    split="iid",
    shard_sizes="equal",
    density=0.1,
    momentum=0.9,
    inner_optimizer="sgd",
    mu=4.0,
    denominator="previous",
    indices="auto",
    values="float32",
)


def build_model():
    return keras.Sequential(
        [keras.Input((5, 4)), keras.layers.Flatten(), keras.layers.Dense(3)]
    )


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((60, 5, 4)).astype(np.float32)
    labels = rng.integers(3, size=60)
    return image_training.Task(
        build_model, tf.constant(images), labels, (images, labels), held_out=6
    )


@pytest.fixture
def args(tmp_path):
    return types.SimpleNamespace(**vars(ARGS), output_dir=str(tmp_path))


@pytest.fixture
def weights_after(monkeypatch):
    """The weights at every test of a run, of which the accuracy is nothing."""
    found = []

    def accuracy(self, weights, images, labels):
        found.append(weights.numpy())
        return 0.5

    monkeypatch.setattr(simulated_training._Run, "accuracy", accuracy)
    return found


@pytest.mark.parametrize("method", ["dense", "shift_masked", "ef21"])
def test_steps_are_those_of_the_strategy(
    mirrored, task, args, weights_after, monkeypatch, method
):
    result = simulated_training.train(task, args, False, method, RATE, SEED)
    assert result["round"] == [2, 4, 6]

    model_weights = []
    monkeypatch.setattr(
        image_training.Tester,
        "on_train_batch_end",
        lambda self, batch, logs=None: model_weights.append(
            np.concatenate([w.ravel() for w in self.model.get_weights()])
        ),
    )
    expected = image_training.train(
        task, mirrored(2), args, False, method, RATE, SEED
    )
    assert result["bytes_a_step"] == expected["bytes_a_step"]
    np.testing.assert_allclose(
        weights_after, model_weights[1::2], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "method, num_phases",
    [("dense", 1), ("shift_at_once_sign", 1), ("shift_at_once_sign", 3)],
)
def test_goes_on_where_it_was_stopped(
    task, args, weights_after, monkeypatch, method, num_phases
):
    args.schedule, args.density_phases = "cosine", num_phases
    whole = simulated_training.train(task, args, False, method, RATE, SEED)
    [*expected] = weights_after

    monkeypatch.setattr(simulated_training, "_SAVE_EVERY", 2)
    step, steps = simulated_training._Run.step, []

    def step_until(self, gradients, t, rate, arrays):
        steps.append(t)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, gradients, t, rate, arrays)

    monkeypatch.setattr(simulated_training._Run, "step", step_until)
    weights_after.clear()
    with pytest.raises(KeyboardInterrupt):
        simulated_training.train(task, args, False, method, RATE, SEED)
    resumed = simulated_training.train(task, args, False, method, RATE, SEED)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    assert resumed == whole
    np.testing.assert_array_equal(weights_after, expected)


def test_looks_ahead_of_the_residual_errors(task, args, monkeypatch):
    """The gradients are those at weights from which the errors are taken."""
    seen = []
    gradient = training_programs.Network.gradient

    def noted(self, weights, images, labels):
        seen.append(weights)
        return gradient(self, weights, images, labels)

    monkeypatch.setattr(training_programs.Network, "gradient", noted)
    model = build_model()
    args.look_ahead = "all"
    run = simulated_training._Run(model, "dgc", args)
    weights = tf.concat(
        [tf.reshape(v, [-1]) for v in model.trainable_variables], axis=0
    )
    arrays = run.start(weights)
    place = next(i for i, a in enumerate(arrays) if a.shape.rank == 2)
    rng = np.random.default_rng(0)
    e = rng.standard_normal(arrays[place].shape).astype(np.float32)
    arrays[place] = tf.constant(e)
    x = weights.numpy()
    for whose, held in (("all", e.sum(axis=0)), ("own", 2 * e)):
        args.look_ahead = whose
        run = simulated_training._Run(model, "dgc", args)
        found = run._look_ahead(tf.constant(0.5), *arrays)
        expected = np.broadcast_to(x - 0.5 * held, e.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        seen.clear()
        batch = task.images[:8].numpy().reshape([2, 4, 5, 4])
        labels = task.labels[:8].reshape([2, 4])
        together = run.gradients(0.5, arrays, batch, labels)
        assert len(seen) == 2
        args.look_ahead = "none"
        plain = simulated_training._Run(model, "dgc", args)
        for n in range(2):
            at = [tf.constant(expected[n]), *arrays[1:]]
            one = plain.gradients(0.5, at, batch, labels)[n]
            np.testing.assert_allclose(together[n], one, rtol=1e-4, atol=1e-6)


def test_looks_ahead_only_where_errors_are_applied_as_they_are(args):
    args.look_ahead = "own"
    for method, message in (
        ("dense", "without a residual error"),
        ("topk", "not plain SGD"),
    ):
        with pytest.raises(ValueError, match=message):
            simulated_training._Run(build_model(), method, args)


def test_tuning_is_shorter_and_on_images_held_out(task, args, monkeypatch):
    tested = []
    monkeypatch.setattr(
        simulated_training._Run,
        "accuracy",
        lambda self, weights, images, labels: tested.append(images) or 0.5,
    )
    result = simulated_training.train(task, args, True, "topk", RATE, SEED)
    assert result["round"] == [2]
    [images] = tested
    np.testing.assert_array_equal(images, task.images[-6:])


def test_telemetry(task, args, monkeypatch):
    """Of steps in between, RegTop-k's own among it."""
    monkeypatch.setattr(simulated_training, "_MEASURE_EVERY", 3)
    result = simulated_training.train(task, args, False, "regtopk", RATE, SEED)
    telemetry = result["telemetry"]
    assert [numbers.pop("step") for numbers in telemetry] == [2, 5]
    for numbers in telemetry:
        assert set(numbers) == {
            "unlike_top_k",
            "damped",
            "selected_again",
            "cancelled",
            "residual",
        }
        assert all(value >= 0 for value in numbers.values())
        assert numbers["cancelled"] < 1
        assert numbers["unlike_top_k"] <= 1
        assert numbers["residual"] > 0
    dense = simulated_training.train(task, args, False, "dense", RATE, SEED)
    assert not dense["telemetry"]


def test_the_density_follows_the_learning_rate(task, args, monkeypatch):
    """In phases, with the residual errors of the one before."""
    args.schedule, args.density_phases = "cosine", 2
    step, runs, before = simulated_training._Run.step, [], []

    def noted(self, gradients, t, rate, arrays):
        runs.append(self)
        before.append(arrays)
        return step(self, gradients, t, rate, arrays)

    monkeypatch.setattr(simulated_training._Run, "step", noted)
    found = simulated_training.train(task, args, False, "regtopk", RATE, SEED)
    assert [run is runs[0] for run in runs] == [True] * 3 + [False] * 3
    first, second = runs[0].density, runs[-1].density
    assert first > 0.1 > second
    assert (first + second) / 2 == pytest.approx(0.1, rel=1e-3)
    # The residual errors stay, and what RegTop-k remembers is dropped.
    [errors] = [a.numpy() for a in before[3] if a.shape == [2, 63]]
    assert np.count_nonzero(errors)
    assert np.isnan(before[3][-1]).all() and not np.isnan(before[4][-1]).any()
    bytes_a_step = [
        training_programs.Method("regtopk", args, build_model(), d).bytes_a_step
        for d in (first, second)
    ]
    assert found["bytes_a_step"] == round(np.mean(bytes_a_step))


@pytest.mark.parametrize("schedule, last", [("constant", 2.0), ("cosine", 0.0)])
def test_learning_rate(schedule, last):
    rates = [
        simulated_training.learning_rate_at(t, 1000, 2.0, 0.1, schedule)
        for t in range(1000)
    ]
    np.testing.assert_allclose(rates[:100], np.arange(1, 101) / 50)
    assert max(rates) == 2.0
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[-1] == pytest.approx(last, abs=1e-4)


def test_signs_take_the_bytes_of_floats():
    model = keras.Sequential([keras.Input((900,)), keras.layers.Dense(99)])
    args = types.SimpleNamespace(**{**vars(ARGS), "density": 0.001})
    floats, signs = (
        training_programs.Method(name, args, model).bytes_a_step
        for name in ("topk", "topk_sign")
    )
    assert floats == pytest.approx(signs, rel=0.02)


@old_versions.needs_data_sets
def test_script(tmp_path):
    """It tunes, tests and reports."""
    summary, _ = example_runner.run_example(
        "studies/cifar10_long",
        tmp_path,
        num_mock_images=60,
        methods="topk_sign",
        num_workers=2,
        batch_size=2,
        rounds=2,
        tuning_rounds=1,
        evaluate_every=2,
        learning_rates="0.01,0.1",
    )
    [signs] = summary["methods"].values()
    assert set(signs["tuning"]) == {"0.01", "0.1"}
    lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    settings = [json.loads(line)["setting"] for line in lines]
    assert [s["rounds"] for s in settings] == [1, 1, 2]
    assert not any("tuning_rounds" in setting for setting in settings)
