"""Kept runs: what is read of them, and the published table."""

import doctest
import json

import comparison
import example_runner
import kept_runs
import paths
import pytest

RESULTS = paths.ROOT / "docs" / "results"
SETTING = {"split": "iid", "rounds": 6, "density": 0.001}


def write(path, *runs, **changes):
    """A file as the studies write it.

    Args:
        path: Of the file.
        *runs: Tuples of a method, a learning rate, a seed and accuracies.
        **changes: Of the setting.
    """
    lines = [
        json.dumps(
            {
                "setting": {
                    **SETTING,
                    "is_tuning": False,
                    "method": method,
                    "learning_rate": rate,
                    "seed": seed,
                    **changes,
                },
                "result": {"round": [3, 6], "accuracy": accuracies},
            }
        )
        for method, rate, seed, accuracies in runs
    ]
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(f"{line}\n" for line in lines))
    return path


def test_examples_of_docstrings():
    results = doctest.testmod(kept_runs)
    assert results.attempted > 0
    assert results.failed == 0


def test_runs_of_another_setting_do_not_count(tmp_path):
    path = tmp_path / "runs.jsonl"
    write(path, ("dense", 0.1, 0, [0.4, 0.8]), ("dense", 0.1, 1, [0.5, 0.7]))
    write(path, ("dense", 0.2, 0, [0.1, 0.1]), density=0.5)
    write(path, ("dense", 0.3, 0, [0.1, 0.1]), is_tuning=True)
    write(path, ("dense", 0.1, 1, [0.1, 0.1]), look_ahead="own")
    found = kept_runs.read(path, {"density": 0.001, "unknown": 7})
    rate, runs = found["dense"]
    assert (rate, list(runs)) == (0.1, [0, 1])
    assert kept_runs.final(runs) == {0: 0.8, 1: 0.7}
    steps, accuracies = kept_runs.mean_curve(runs)
    assert list(steps) == [3, 6]
    assert list(accuracies) == pytest.approx([0.45, 0.75])
    _, others = kept_runs.read(path, {"look_ahead": "own"})["dense"]
    assert kept_runs.final(others) == {1: 0.1}
    with pytest.raises(ValueError, match=r"one learning rate.*\[0.1, 0.2\]"):
        kept_runs.read(path, {})
    with pytest.raises(ValueError, match="must hold runs of `topk`"):
        kept_runs.read(path, {"density": 0.001}, ["topk"])


def test_one_split_a_file(tmp_path):
    path = write(tmp_path / "runs.jsonl", ("dense", 0.1, 0, [0.4, 0.8]))
    assert kept_runs.read_split(path, {})[0] == "iid"
    write(path, ("dense", 0.1, 0, [0.4, 0.8]), split="by_label")
    with pytest.raises(ValueError, match=r"one split.*by_label"):
        kept_runs.read_split(path, {})


def test_a_method_may_lack_one_of_the_splits(tmp_path):
    path = write(
        tmp_path / "runs.jsonl",
        ("dense", 0.1, 0, [0.4, 0.8]),
        ("topk", 0.3, 0, [0.4, 0.7]),
        ("topk", 0.1, 0, [0.4, 0.7]),
    )
    _, found = kept_runs.read_split(path, SETTING, ["powersgd1", "dense"])
    assert list(found) == ["dense"]
    assert kept_runs.read_split(path, SETTING, ["powersgd1"])[1] == {}


def test_points_are_of_seeds_that_both_have(tmp_path):
    path = write(
        tmp_path / "runs.jsonl",
        ("dense", 0.1, 0, [0.4, 0.8]),
        ("dense", 0.1, 1, [0.4, 0.6]),
        ("dense", 0.1, 2, [0.4, 0.1]),
        ("topk", 0.3, 0, [0.4, 0.7]),
        ("topk", 0.3, 1, [0.4, 0.3]),
    )
    split, found = kept_runs.read_split(path, SETTING)
    *_, dense, topk = kept_runs.markdown_table({split: found}, "dense").split(
        "\n"
    )
    assert dense == "| `dense` | .500 ± .361 |  |"
    assert topk == "| `topk` | .500 ± .283 | \N{MINUS SIGN}20.0 ± 10.0 |"


def test_the_legend_has_the_methods_of_all_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(kept_runs.example_utils.plt, "close", figures.append)
    runs = 0.1, {0: {"round": [3, 6], "accuracy": [0.4, 0.8]}}
    kept_runs.plot(
        {"iid": {"dense": runs, "topk": runs}, "by_label": {"dense": runs}},
        tmp_path / "figure.png",
    )
    [figure] = figures
    *_, last = figure.axes
    assert [text.get_text() for text in last.get_legend().get_texts()] == [
        "dense",
        "topk",
    ]


def test_program(tmp_path):
    paths_of_runs = [
        write(
            tmp_path / f"{split}.jsonl",
            ("dense", 0.1, 0, [0.4, 0.8]),
            ("topk", 0.1, 0, [0.3, 0.6]),
            split=split,
        )
        for split in ("iid", "by_label")
    ]
    output = example_runner.output_of(
        "studies/kept_runs",
        f"--runs={','.join(map(str, paths_of_runs))}",
        "--rounds=6",
        "--pairs=topk-dense",
        f"--output={tmp_path / 'figures' / 'figure.png'}",
    )
    assert "| method | iid | from dense | by_label | from" in output
    assert "by_label: topk - dense: \N{MINUS SIGN}20.0" in output
    assert (tmp_path / "figures" / "figure.png").exists()


@pytest.mark.parametrize(
    "study, setting, splits, num_methods",
    [
        ("cifar10_long", dict(rounds=6000), ("iid", "dirichlet"), 11),
        ("cifar10_long", dict(rounds=20000), ("dirichlet",), 3),
        ("cifar10_long", dict(rounds=6000), ("by_label",), 2),
        (
            "text_long",
            dict(rounds=6000, inner_optimizer="adam"),
            ("dirichlet",),
            4,
        ),
    ],
)
def test_published_table_is_that_of_the_kept_runs(
    study, setting, splits, num_methods
):
    splits = dict(
        kept_runs.read_split(
            RESULTS / f"{study}_{split}" / "runs.jsonl", setting
        )
        for split in splits
    )
    made = kept_runs.markdown_table(splits, "dense").splitlines()[2:]
    page = (paths.ROOT / "docs" / "results.md").read_text("utf-8")
    published = page.replace("**", "").splitlines()
    assert len(made) == num_methods
    assert [row for row in made if row not in published] == []


def test_published_gain_at_a_compression_of_300():
    def runs_of(method, folder):
        path = RESULTS / folder / "runs.jsonl"
        _, runs = kept_runs.read(path, {"rounds": 6000})[method]
        return runs

    dense = runs_of("dense", "cifar10_long_dirichlet")
    sparse = runs_of("shift_at_once_sign", "cifar10_long_dirichlet_300")
    accuracy = kept_runs.accuracy(list(kept_runs.final(sparse).values()))
    page = (paths.ROOT / "docs" / "results.md").read_text("utf-8")
    gain = kept_runs.points(kept_runs.gains(sparse, dense))
    published = f"an accuracy of {accuracy}: {gain} points from the dense"
    assert published in " ".join(page.split())


def test_published_gains_of_a_density_that_decays():
    page = (paths.ROOT / "docs" / "results.md").read_text("utf-8")
    rows = {1: "| constant density |", 8: "| `DensityDecay` |"}
    gained = []
    for split in ("iid", "dirichlet", "by_label"):
        folder = RESULTS / f"cifar10_long_{split}"
        of_all, runs_of = folder / "runs.jsonl", {}
        _, dense = kept_runs.read(of_all, {"rounds": 6000})["dense"]
        for num_phases, path in (
            (1, of_all),
            (8, RESULTS / f"cifar10_long_{split}_decay" / "runs.jsonl"),
        ):
            setting = {"rounds": 6000, "density_phases": num_phases}
            method = "shift_at_once_sign"
            _, runs = kept_runs.read(path, setting, [method])[method]
            accuracy = kept_runs.accuracy(list(kept_runs.final(runs).values()))
            gain = kept_runs.points(kept_runs.gains(runs, dense))
            rows[num_phases] += f" {accuracy} | {gain} |"
            runs_of[num_phases] = runs
        gained.append(kept_runs.points(kept_runs.gains(runs_of[8], runs_of[1])))
    assert set(rows.values()) <= set(page.splitlines())
    lost, *won = (text.strip("+\N{MINUS SIGN}") for text in gained)
    assert gained == [f"\N{MINUS SIGN}{lost}", *(f"+{text}" for text in won)]
    page = " ".join(page.split())
    assert f"it gains {won[0]} points over a constant" in page
    assert f"(#what-else-was-compared) {won[1]}." in page
    assert f"does no harm, it loses {lost}." in page


def test_setting_of_older_runs_is_kept():
    """Values from before a flag are left out, and no others."""
    config = {
        "max_images": None,
        "inner_optimizer": "sgd",
        "look_ahead": "own",
        "density": 0.1,
        "seeds": ["0"],
    }
    assert comparison.shared_setting(config) == {
        "max_images": None,
        "look_ahead": "own",
        "density": 0.1,
    }
