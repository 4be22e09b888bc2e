"""The studies, shortened, and on images made up."""

import types

import density_sweep
import digits_study
import example_runner
import keras
import linear_regression
import numpy as np
import old_versions
import pytest
import reference
import resnet
import tensorflow as tf
import toy_logistic
import worker_data

LABELS = np.random.default_rng(7).integers(10, size=5000)


SMALL = dict(
    num_mock_images=100, num_workers=2, batch_size=3, rounds=3, evaluate_every=2
)


@pytest.mark.slow
@old_versions.needs_data_sets
def test_cifar10_script(tmp_path):
    """Tunes, runs every seed once, and goes on where it was stopped.

    From the same weights and on the same batches: at density 1 Top-k is as
    dense, even in its last digits.
    """
    settings = dict(
        SMALL,
        methods="dense,topk",
        learning_rates="0.01,0.1",
        density=1,
        split="dirichlet:1",
        shard_sizes="unequal",
    )
    summary, output = example_runner.run_example(
        "studies/cifar10_resnet", tmp_path, **settings
    )
    assert summary["config"]["split"] == "dirichlet:1"
    methods = summary["methods"]
    assert list(methods) == ["dense", "topk"]
    for name, method in methods.items():
        tuning = method["tuning"]
        assert tuning[str(method["learning_rate"])] == max(tuning.values())
        [run] = method["runs"].values()
        assert run["round"] == [2, 3]
        assert method["accuracy"] == run["accuracy"][-1]
        assert f"\n{name} " in output
    dense, topk = methods["dense"], methods["topk"]
    assert dense["tuning"] == topk["tuning"]
    dense, topk = dense["runs"]["0"], topk["runs"]["0"]
    assert dense["accuracy"] == topk["accuracy"]
    # A ring of two sends each half twice, and a gather all with its header.
    assert dense["bytes_a_step"] == 4 * 78042
    assert topk["bytes_a_step"] == 4 * (78042 + 2)

    runs = (tmp_path / "runs.jsonl").read_text("utf-8")
    assert runs.count("\n") == 2 * (2 + 1)
    settings.update(methods="dense", learning_rates="0.01", seeds="0,5")
    again, output = example_runner.run_example(
        "studies/cifar10_resnet", tmp_path, **settings
    )
    more = (tmp_path / "runs.jsonl").read_text("utf-8")
    assert more.startswith(runs)
    kept = methods["dense"]["learning_rate"] == 0.01
    assert more.count("\n") == 7 + (not kept)
    assert list(again["methods"]["dense"]["runs"]) == ["0", "5"]
    assert not kept or again["methods"]["dense"]["runs"]["0"] == dense


@pytest.mark.slow
@old_versions.needs_data_sets
def test_imagenette_script(tmp_path):
    summary, _ = example_runner.run_example(
        "studies/imagenette_finetune",
        tmp_path,
        **SMALL,
        model="MobileNet",
        weights="none",
        image_size=32,
        trainable="head",
        methods="dense,regtopk",
        density=0.01,
    )
    dense, regtopk = summary["methods"].values()
    assert dense["runs"]["0"]["bytes_a_step"] == 4 * 10250  # Of the last layer
    assert regtopk["runs"]["0"]["round"] == [2, 3]


def test_digits_study_script(tmp_path):
    summary, _ = example_runner.run_example(
        "studies/digits_study",
        tmp_path,
        methods="dense,shift_regtopk_inner,shift_masked,powersgd1",
        density=0.02,
        split="dirichlet:1",
        learning_rates=0.02,
        rounds=300,
    )
    methods = summary["methods"]
    # One training and 360 images: no closer to what is reached.
    assert min(method["accuracy"] for method in methods.values()) > 0.8
    assert (
        methods["dense"]["runs"]["0"]["bytes_a_step"] == 4 * 4810 * 2 * 7 // 8
    )


def test_decentralised_study_script(tmp_path):
    settings = dict(
        methods="dense,one_peer_8_bits,cliques",
        num_workers=4,
        split="by_label",
        learning_rates=0.05,
        rounds=60,
        evaluate_every=30,
    )
    summary, output = example_runner.run_example(
        "studies/decentralised_study", tmp_path, **settings
    )
    methods = summary["methods"]
    dense, one_peer, cliques = methods.values()
    assert dense["own_accuracy"] == dense["accuracy"] > 0.6
    # Each worker has few of the digits.
    assert 0.4 < one_peer["own_accuracy"] < one_peer["accuracy"] - 0.02
    # All workers are in one clique, and agree.
    assert cliques["own_accuracy"] == pytest.approx(
        cliques["accuracy"], abs=0.01
    )
    assert cliques["accuracy"] == pytest.approx(dense["accuracy"], abs=0.05)
    [run] = one_peer["runs"].values()
    assert run["round"] == [30, 60]
    # A byte a weight, the range of each block, and the header.
    assert 4810 < run["bytes_a_step"] < 1.02 * 4810
    # Weights and gradients of the three others.
    [run] = cliques["runs"].values()
    assert run["bytes_a_step"] == 3 * (4 * 4810 + 8) + 3 * 4 * 4810
    assert "workers' own" in output
    # Everything is kept.
    runs = (tmp_path / "runs.jsonl").read_text("utf-8")
    example_runner.run_example(
        "studies/decentralised_study", tmp_path, **settings
    )
    assert (tmp_path / "runs.jsonl").read_text("utf-8") == runs


@pytest.mark.slow
def test_digits_study_rounds_values(tmp_path):
    """What takes fewer bytes is what the weights follow."""
    results = []
    for values in ("float32", "ternary"):
        summary, _ = example_runner.run_example(
            "studies/digits_study",
            tmp_path,
            methods="topk",
            values=values,
            density=0.02,
            learning_rates=0.05,
            rounds=50,
            evaluate_every=1,
        )
        run = summary["methods"]["topk"]["runs"]["0"]
        results.append((run["bytes_a_step"], run["accuracy"]))
    (exact_bytes, exact), (ternary_bytes, ternary) = results
    assert ternary_bytes < 0.4 * exact_bytes
    # After each of 50 steps, because any one accuracy may be the same.
    assert ternary != exact


def test_reselection_script(tmp_path):
    """Without error feedback the same gradient is sent again and again."""
    settings = dict(
        num_workers=2,
        # Nearly all images of a worker, so that steps are alike.
        batch_size=500,
        rounds=10,
        learning_rate=0.001,
        # So small that nothing is held back, and Top-k's entries are sent.
        mu=1e-6,
        seeds="0,1",
        densities="0.01",
    )
    shares = {}
    for error_feedback in ("none", "accumulate"):
        summary, _ = example_runner.run_example(
            "studies/reselection",
            tmp_path / error_feedback,
            error_feedback=error_feedback,
            **settings,
        )
        [row] = summary["densities"].values()
        assert 0 <= row["held_back"] < 0.01
        assert row["gain_standard_error"] >= 0
        shares[error_feedback] = row["again"]
    assert shares["none"] > 0.5
    assert shares["accumulate"] < 0.2


@pytest.mark.slow
def test_digits_study_with_adam(tmp_path):
    summary, _ = example_runner.run_example(
        "studies/digits_study",
        tmp_path,
        methods="shift_regtopk",
        inner_optimizer="adam",
        momentum=0,
        density=0.02,
        learning_rates=0.002,
        rounds=300,
    )
    assert summary["methods"]["shift_regtopk"]["accuracy"] > 0.8


def test_gradients_of_the_digits():
    """Each worker's own, against differences of its loss."""
    rng = np.random.default_rng(0)
    weights = digits_study.start_weights(0)
    weights += rng.standard_normal(len(weights)) * 0.1
    x = tf.constant(rng.random((1, 3, 5, 64)), tf.float32)
    y = tf.constant(rng.integers(10, size=(1, 3, 5)), tf.int32)
    gradients = digits_study.gradients_of(weights, (x, y), 0)
    assert gradients.shape == (3, 4810)
    for j in (5, 4100, 4200, 4805):
        change = np.zeros(4810, "float32")
        change[j] = 1e-2
        losses = [
            keras.losses.sparse_categorical_crossentropy(
                y[0],
                digits_study.logits(tf.stack([w] * 3), x[0]),
                from_logits=True,
            )
            for w in (weights + change, weights - change)
        ]
        slope = tf.reduce_mean(losses[0] - losses[1], axis=1) / 2e-2
        np.testing.assert_allclose(gradients[:, j], slope, atol=2e-3)


def test_resnets():
    resnet18 = resnet.build_resnet("resnet18", "batch")
    trained = sum(int(np.prod(v.shape)) for v in resnet18.trainable_variables)
    assert trained == 11_173_962  # That of others for CIFAR-10.
    assert resnet18.output_shape == (None, 10)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("split", ["iid", "by_label", "dirichlet:0.5"])
def test_shards(split, sizes):
    parts = worker_data.shards(LABELS, 5, split, sizes, 20, seed=3)
    again = worker_data.shards(LABELS, 5, split, sizes, 20, seed=3)
    other = worker_data.shards(LABELS, 5, split, sizes, 20, seed=4)
    together = np.concatenate(parts)
    np.testing.assert_array_equal(together, np.concatenate(again))
    assert np.any(together != np.concatenate(other))
    np.testing.assert_array_equal(np.sort(together), np.arange(5000))
    lengths = np.array([len(part) for part in parts])
    if not split.startswith("dirichlet"):
        share = np.arange(1, 6) / 15 if sizes == "unequal" else np.full(5, 0.2)
        np.testing.assert_allclose(lengths, 5000 * share, atol=1)
    elif sizes == "unequal":
        assert lengths[0] < lengths[-1]
    counts = np.array([np.bincount(LABELS[p], minlength=10) for p in parts])
    shares = counts / lengths[:, None]
    if split == "iid":
        assert shares.max() < 0.2
    else:
        assert shares.max() > 0.2
    if split == "by_label" and sizes == "equal":
        assert np.count_nonzero(counts, axis=1).max() <= 4


def test_shards_are_large_enough():
    parts = worker_data.shards(LABELS, 8, "dirichlet:0.1", "equal", 100, 0)
    assert min(len(part) for part in parts) >= 100
    with pytest.raises(
        ValueError, match="at least 700 images.* Received: 5000"
    ):
        worker_data.shards(LABELS, 8, "iid", "equal", 700, 0)
    with pytest.raises(ValueError, match="split='dirichlet:0.1'"):
        worker_data.shards(LABELS, 8, "dirichlet:0.1", "equal", 700, 0)


def test_batches():
    """Each worker's own images, all of them before one comes again."""
    parts = [np.arange(10), np.arange(10, 17)]
    numbers = worker_data.batches(parts, 3, rounds=9, seed=1)
    assert numbers.shape == (9, 2, 3)
    for n, part in enumerate(parts):
        drawn = numbers[:, n].ravel()
        for start in range(0, len(drawn) - len(part), len(part)):
            np.testing.assert_array_equal(
                np.sort(drawn[start : start + len(part)]), part
            )


def test_bad_split():
    """Told before anything is loaded."""
    message = example_runner.refusal_of(
        "studies/cifar10_resnet", "--split=dirichlet:0"
    )
    assert "--split=dirichlet:0: must be" in message


def test_density_sweep_follows_the_reference():
    keras.config.set_floatx("float64")
    args = types.SimpleNamespace(
        mu=4.0,
        denominator="previous",
        indices="auto",
        values="float32",
        num_workers=3,
        learning_rate=0.05,
        rounds=30,
        keep=None,
    )
    problem = linear_regression.make_problem(3, 7, 11, 5)
    features, targets, optimum = problem
    training = density_sweep.make_training("shift_regtopk", 0.4, args)
    curve = density_sweep.train(*training, problem)

    workers = reference.Workers(
        "regtopk", 3, [7], 0.4, feedback=reference.LearnedShift()
    )
    w, expected = np.zeros(7), []
    for _ in range(args.rounds):
        residuals = features @ w - targets[..., 0]
        gradients = 2 * np.einsum("nij,ni->nj", features, residuals) / 11
        w = w - args.learning_rate * workers.step(gradients)
        expected.append(np.sum((w - optimum) ** 2))
    np.testing.assert_allclose(curve, np.log10(expected), rtol=1e-9)
    # Owners that keep one sum each take other steps.
    args.keep = 0.5
    training = density_sweep.make_training("shift_regtopk", 0.4, args)
    by_owners = density_sweep.train(*training, problem)
    assert np.abs(by_owners - curve).max() > 0.01
    assert by_owners[-1] < by_owners[0]


@pytest.mark.slow
def test_density_sweep_script(tmp_path):
    summary, output = example_runner.run_example(
        "studies/density_sweep",
        tmp_path,
        num_workers=4,
        dimension=20,
        points_per_worker=200,
        rounds=700,
        learning_rate=0.05,
        densities="0.05,0.6",
        seeds="0,1",
        methods="topk,regtopk,shift",
    )
    final = summary["final_log10_distance"]
    assert np.max(final["shift"]) < -15
    assert np.max(final["regtopk"][1]) < -15
    assert np.min(final["topk"]) > -6
    assert np.shape(final["topk"]) == (2, 2)
    assert f"{np.min(final['shift'][0]):.1f} .." in output


def test_toy_logistic_script(tmp_path):
    summary, _ = example_runner.run_example("studies/toy_logistic", tmp_path)
    methods = summary["methods"]
    # Top-k stands still until the second entry's error is as large as the
    # first entry, a hundred rounds.
    assert methods["topk"]["rounds_without_progress"] == 100
    assert methods["dense"]["rounds_without_progress"] == 0
    assert methods["regtopk"]["rounds_without_progress"] <= 2
    dense, regtopk = (methods[m]["final_loss"] for m in ("dense", "regtopk"))
    np.testing.assert_allclose(regtopk, dense, rtol=0.05)


def test_toy_logistic_loss():
    np.testing.assert_allclose(
        toy_logistic.loss(np.array([[0.0], [1.0]])), np.log1p(np.exp(-1.0))
    )
