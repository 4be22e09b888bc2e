"""The examples, shortened, and the methods that they compare."""

import re
import types

import comparison  # noqa: F401  It adds the methods of studies.
import custom_error_feedback
import example_runner
import example_utils
import keras
import linear_regression
import methods
import numpy as np
import pytest
import reference
import shift_variants
import tensorflow as tf

import tf_regtopk


def accuracies(output):
    """Those of each epoch, on the images it trains on."""
    return [float(a) for a in re.findall(r"- accuracy: ([0-9.]+)", output)]


def test_quickstart():
    output = example_runner.output_of("quickstart", "--epochs=2")
    assert accuracies(output)[-1] > 0.5
    assert "861 of 17,226, by each of 2 replicas" in output


def test_custom_sparsifier():
    """What is loaded goes on with the user's sparsifier."""
    output = example_runner.output_of(
        "custom_sparsifier", "--epochs=1", "--density=0.1", "--rest=0.25"
    )
    before, after = output.split("Loaded a model")
    assert "RestingTopK(density=0.1, rest=0.25)" in after
    assert accuracies(before) < accuracies(after)
    assert accuracies(after)[0] > 0.5


def test_custom_error_feedback():
    output = example_runner.output_of("custom_error_feedback", "--epochs=2")
    assert accuracies(output)[-1] > 0.5


@pytest.mark.parametrize(
    "decay, rule",
    [(0.0, tf_regtopk.NoFeedback()), (1.0, tf_regtopk.Accumulate())],
)
def test_custom_error_feedback_between_the_librarys(decay, rule):
    custom = custom_error_feedback.ForgetfulAccumulate(decay)
    weights = []
    for error_feedback in (custom, rule):
        variable = keras.Variable(np.zeros(6), dtype="float64")
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.5),
            tf_regtopk.TopK(0.4),
            error_feedback=error_feedback,
        )
        for g in np.random.default_rng(0).standard_normal((5, 6)):
            optimizer.apply([tf.constant(g)], [variable])
        weights.append(variable.numpy())
    np.testing.assert_array_equal(*weights)


@pytest.mark.slow
def test_linear_regression_script(tmp_path):
    """Small enough to be quick, large enough to tell the methods apart."""
    summary, output = example_runner.run_example(
        "linear_regression",
        tmp_path,
        num_workers=3,
        dimension=20,
        points_per_worker=200,
        rounds=175,
        learning_rate=0.1,
        density=0.6,
        indices="elias_fano",
        values="float32",
    )
    final = {
        name: method["final_log10_distance"]
        for name, method in summary["methods"].items()
    }
    assert list(final) == ["dense", "topk", "regtopk"]
    assert final["dense"] < -20
    assert final["regtopk"] < -15
    assert final["topk"] > -6
    assert summary["config"]["density"] == 0.6
    assert summary["config"]["num_workers"] == 3
    for name, value in final.items():
        assert f"{name:10} {value:8.2f}" in output


METHOD_ARGS = types.SimpleNamespace(
    mu=2.0, denominator="current", indices="golomb", values="natural"
)


def test_figures_tell_methods_apart():
    names = [n for n in methods.METHODS if "_owners" not in n]
    known = [n for n in names if "color" in example_utils.style(n)]
    looks = [
        (style["color"], style.get("dashes"))
        for style in map(example_utils.style, known)
    ]
    assert len(set(looks)) == len(known) > 20
    colours = [example_utils.style(n)["color"] for n in ("topk", "topk_sign")]
    assert colours[0] == colours[1]
    assert example_utils.style("mine.py:f") == {"label": "mine.py:f"}


def test_methods_are_what_their_flags_say():
    topk = tf_regtopk.TopK(0.25)
    regtopk = tf_regtopk.RegTopK(0.25, 2.0, denominator="current")
    accumulate = tf_regtopk.Accumulate()
    local_shift = tf_regtopk.LearnedShift(momentum=0.75)
    # With the momentum of the inner optimizer, and its learning rate.
    expected = {
        "topk_no_feedback": (topk, tf_regtopk.NoFeedback(), 0.75, 0.5),
        "topk": (topk, accumulate, 0.75, 0.5),
        "regtopk": (regtopk, accumulate, 0.75, 0.5),
        "regtopk_local": (regtopk, tf_regtopk.Accumulate(0.75), 0.0, 0.5),
        "randomk": (tf_regtopk.RandomK(0.25), accumulate, 0.75, 0.5),
        "dgc": (topk, tf_regtopk.Accumulate(0.75, True), 0.0, 0.5),
        "ef21": (topk, tf_regtopk.EF21(momentum=0.25), 0.0, 2.0),
        "shift": (topk, local_shift, 0.0, 0.5),
        "shift_regtopk": (regtopk, local_shift, 0.0, 0.5),
        "shift_regtopk_inner": (regtopk, tf_regtopk.LearnedShift(), 0.75, 0.5),
        "topk_at_once": (topk, accumulate, 0.0, 2.0),
        "shift_at_once": (
            regtopk,
            tf_regtopk.LearnedShift(momentum=0.75, at_once=True),
            0.0,
            0.5,
        ),
        "local_adam": (
            regtopk,
            tf_regtopk.LocalAdam(tf_regtopk.LearnedShift()),
            0.0,
            0.5,
        ),
        "shift_slow": (
            regtopk,
            tf_regtopk.LearnedShift(0.0625, 0.75),
            0.0,
            0.5,
        ),
        "shift_fast": (regtopk, tf_regtopk.LearnedShift(1, 0.75), 0.0, 0.5),
        "shift_masked": (
            regtopk,
            tf_regtopk.LearnedShift(momentum=0.75, factor_masking=True),
            0.0,
            0.5,
        ),
        "shift_rounded": (
            regtopk,
            shift_variants.RoundedShift(momentum=0.75),
            0.0,
            0.5,
        ),
    }
    with_owners = {
        f"{name}_owners{keep}"
        for name in ("topk", "regtopk", "shift_regtopk", "shift_masked")
        for keep in ("", 4)
    }
    without_mean = {"adam_without_mean", "adam_without_mean_sign"}
    with_signs = {f"{name}_sign" for name in {*expected} | with_owners}
    peers = {"powersgd1", "powersgd4", "dense_float16"}
    dense = {"dense", "dense_at_once"}
    assert (
        {*dense, *expected} | peers | with_owners | with_signs | without_mean
    ) == set(methods.METHODS)
    # Owners take indices in a fixed length.
    of_ten = types.SimpleNamespace(
        **{**vars(METHOD_ARGS), "indices": "auto"}, num_workers=10
    )
    for method in with_owners:
        # What arrives are `1.5 + keep` entries in place of 9.
        name, _, keep = method.partition("_owners")
        made = methods.make_optimizer(method, of_ten, 0.5, 0.0625, 0.75)
        topology = tf_regtopk.ReduceScatter(1.5, float(keep or 1))
        assert made.topology == topology
        density = 0.0625 * 10 / (1.5 + topology.keep)
        gathered = methods.make_optimizer(name, of_ten, 0.5, density, 0.75)
        assert made.sparsifier == gathered.sparsifier
        assert made.error_feedback == gathered.error_feedback
        assert gathered.topology == tf_regtopk.AllGather()
        made = methods.make_optimizer(
            f"{method}_sign", of_ten, 0.5, 0.015625, 0.75
        )
        assert made.sparsifier == gathered.sparsifier
        assert made.topology == topology
    for method, parts in expected.items():
        made = methods.make_optimizer(
            method, METHOD_ARGS, 0.5, density=0.25, momentum=0.75
        )
        inner = made.inner_optimizer
        assert parts == (
            made.sparsifier,
            made.error_feedback,
            inner.momentum,
            float(inner.learning_rate),
        )
        assert made.codec == tf_regtopk.Codec("golomb", "natural")
    for method in with_signs - {f"{name}_sign" for name in with_owners}:
        # Of a value of one bit four times the entries take about the bytes.
        made = methods.make_optimizer(
            method, METHOD_ARGS, 0.5, density=0.1, momentum=0.75
        )
        of_floats = methods.make_optimizer(
            method.removesuffix("_sign"),
            METHOD_ARGS,
            0.5,
            density=0.4,
            momentum=0.75,
        )
        assert made.sparsifier == of_floats.sparsifier
        assert made.error_feedback == of_floats.error_feedback
        assert made.codec == tf_regtopk.Codec("golomb", "sign")
    made = methods.make_optimizer("dense_float16", METHOD_ARGS, 0.5, 0.25, 0.75)
    assert made.sparsifier == tf_regtopk.Dense()
    assert made.error_feedback == tf_regtopk.NoFeedback()
    assert made.codec == tf_regtopk.Codec(values="float16")
    assert made.inner_optimizer.momentum == 0.75
    for method, momentum, rate in [
        ("dense", 0.75, 0.5),
        ("dense_at_once", 0, 2),
    ]:
        made = methods.make_optimizer(method, METHOD_ARGS, 0.5, 0.25, 0.75)
        assert type(made) is keras.optimizers.SGD
        assert (made.momentum, float(made.learning_rate)) == (momentum, rate)
    made = methods.make_optimizer("topk", METHOD_ARGS, 0.5, 0.25, adam=True)
    assert type(made.inner_optimizer) is keras.optimizers.Adam
    assert float(made.inner_optimizer.learning_rate) == 0.5
    made = methods.make_optimizer(
        "local_adam", METHOD_ARGS, 0.5, 0.1, adam=True
    )
    assert type(made.inner_optimizer) is keras.optimizers.SGD
    made = methods.make_optimizer("adam_without_mean", METHOD_ARGS, 0.5, 0.25)
    assert (made.sparsifier, made.inner_optimizer.beta_1) == (regtopk, 0)
    assert made.error_feedback == tf_regtopk.LearnedShift()


@pytest.mark.parametrize(
    "method",
    sorted(
        name
        for name in {*methods.METHODS}
        - {"dgc", "shift_masked", "shift_rounded"}
        - {"local_adam", "adam_without_mean"}  # Steps of Adam.
        - {"powersgd1", "powersgd4", "dense_float16"}
        # They round, or send another share of the entries, or take no momentum.
        if not name.endswith(("_sign", "_at_once")) and "_owners" not in name
    ),
)
def test_methods_agree_at_density_one(method):
    """Momentum where the method has it, and a learning rate to match."""
    args = types.SimpleNamespace(
        mu=1e-3, denominator="previous", indices="auto", values="float32"
    )
    rng = np.random.default_rng(0)
    variable = keras.Variable(np.zeros(6), dtype="float64")
    optimizer = methods.make_optimizer(method, args, 0.5, 1.0, 0.75)
    weights, velocity = np.zeros(6), np.zeros(6)
    for g in rng.standard_normal((4, 6)):
        optimizer.apply([tf.constant(g)], [variable])
        velocity = 0.75 * velocity + g
        weights -= 0.5 * velocity
        np.testing.assert_allclose(variable.numpy(), weights, rtol=1e-6)


def test_linear_regression_follows_the_reference(mirrored):
    """Each replica gets its own worker's data, and takes the paper's steps."""
    keras.config.set_floatx("float64")
    # Keras rounds 1 / num_workers to float32, which is exact for 2.
    num_workers, dimension, rounds = 2, 7, 25
    problem = linear_regression.make_problem(num_workers, dimension, 11, 5)
    features, targets, optimum = problem
    distances = linear_regression.train(
        lambda: tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.05), tf_regtopk.RegTopK(0.4)
        ),
        mirrored(num_workers),
        problem,
        rounds,
        "test",
    )

    workers = reference.Workers("regtopk", num_workers, [dimension], 0.4)
    w = np.zeros(dimension)
    for distance in distances:
        residuals = features @ w - targets[..., 0]
        gradients = 2 * np.einsum("nij,ni->nj", features, residuals) / 11
        w = w - 0.05 * workers.step(gradients)
        np.testing.assert_allclose(
            distance, np.sum((w - optimum) ** 2), rtol=1e-9
        )


def test_linear_regression_problem():
    features, targets, optimum = linear_regression.make_problem(4, 5, 100, 0)
    assert features.shape == (4, 100, 5)
    assert targets.shape == (4, 100, 1)
    residuals = features @ optimum - targets[..., 0]
    gradient = np.einsum("nij,ni->j", features, residuals)
    np.testing.assert_allclose(gradient, np.zeros(5), atol=1e-10)
    again = linear_regression.make_problem(4, 5, 100, 0)
    np.testing.assert_array_equal(targets, again[1])
    other = linear_regression.make_problem(4, 5, 100, 1)
    assert np.any(targets != other[1])


MINE = """
import dataclasses

import keras
import tf_regtopk


@dataclasses.dataclass(frozen=True)
class Mine(tf_regtopk.TopK):
    pass


def mine(hyper):
    return hyper.sparsified(Mine(hyper.density), momentum=hyper.momentum)


def number(hyper):
    return hyper.density
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my_methods.py"
    path.write_text(MINE, "utf-8")
    return path


def test_method_of_a_users_file(mine):
    made = [
        methods.make_optimizer(f"{mine}:mine", METHOD_ARGS, 0.5, 0.25, 0.75)
        for _ in range(2)
    ]
    assert made[0].sparsifier == made[1].sparsifier
    assert type(made[0].sparsifier).__name__ == "Mine"
    assert made[0].sparsifier.density == 0.25
    assert made[0].inner_optimizer.momentum == 0.75
    assert made[0].codec == tf_regtopk.Codec("golomb", "natural")
    with pytest.raises(
        TypeError, match=":number` must return a Keras optimizer. Received: 0.2"
    ):
        methods.make_optimizer(f"{mine}:number", METHOD_ARGS, 0.5, 0.25)


def test_versions_of_a_users_file(mine):
    assert methods.version("topk") == {}
    before = methods.version(f"{mine}:mine")
    assert before == methods.version(f"{mine}:number")
    mine.write_text(MINE + "# More.\n", "utf-8")
    assert methods.version(f"{mine}:mine") != before


def test_users_method_is_compared(mine, tmp_path):
    """As the library's, because it is the same one."""
    name = f"{mine}:mine"
    summary, output = example_runner.run_example(
        "studies/digits_study",
        tmp_path,
        methods=f"topk,{name}",
        density=0.02,
        learning_rates=0.02,
        rounds=30,
    )
    topk, mine = (summary["methods"][n]["runs"]["0"] for n in ("topk", name))
    assert topk == mine
    assert f"\n{name} " in output


@pytest.mark.parametrize(
    "name, message",
    [
        ("top", "must be among dense, topk_no_feedback, topk"),
        ("{mine}:other", "must define a function `other`. Received: "),
        ("no_file.py:mine", "`no_file.py` must be a file. Received: "),
    ],
)
def test_unknown_method(mine, name, message):
    """Told before anything is trained."""
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.find(name.format(mine=mine))


def test_unknown_method_of_a_flag():
    message = example_runner.refusal_of(
        "linear_regression", "--methods=dense,top"
    )
    assert "must be among dense, topk_no_feedback, topk" in message
