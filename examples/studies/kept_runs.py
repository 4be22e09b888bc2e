r"""Kept runs of a study as one table and one figure, a column for each split.

    python examples/studies/kept_runs.py --output=docs/cifar10_long.png \
        --runs=docs/results/cifar10_long_iid/runs.jsonl,\
    docs/results/cifar10_long_dirichlet/runs.jsonl

Nothing is trained. For each method and split the table has the mean accuracy
over the seeds and its standard deviation, and the points from `--baseline`,
seed by seed, with their standard error. `--pairs=topk_sign-topk` adds the
points between two methods. The runs are those of `comparison.py`, of
`--rounds` steps and on test images.
"""

import json
import pathlib
import sys

from absl import app
from absl import flags
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import example_utils

_PAIRS = [
    "topk_sign-topk",
    "shift_regtopk_sign-shift_regtopk",
    "shift_regtopk-topk",
    "shift_regtopk_sign-topk_sign",
    "shift_at_once_sign-shift_regtopk_sign",
    "shift_at_once_sign-powersgd1",
    "shift_at_once_sign-powersgd4",
]


def define_flags():
    flags.DEFINE_list("runs", None, "Files runs.jsonl, one a split.")
    flags.mark_flag_as_required("runs")
    flags.DEFINE_list("methods", [], "Methods, in this order; empty: all.")
    flags.DEFINE_string("baseline", "dense", "What the others are beside.")
    flags.DEFINE_list("pairs", _PAIRS, "Of methods, as topk_sign-topk.")
    flags.DEFINE_integer("rounds", 6000, "Number of steps.", lower_bound=1)
    flags.DEFINE_enum("inner_optimizer", "sgd", ["sgd", "adam"], "Of the runs.")
    flags.DEFINE_string("output", "results/kept_runs.png", "The figure.")


def read(path, setting, methods=()):
    """Runs on test images with one setting.

    Args:
        path: A `runs.jsonl` of `comparison.py`.
        setting: Dict from a flag to a value. Runs with another value of one of
            these do not count.
        methods: Those that are read; empty for all.

    Returns:
        Method to `(learning rate, runs)`, the latter from a seed to its result.

    Raises:
        ValueError: If a method has no runs, or those of several learning rates.
    """
    # Those of flags that came later are what the runs before them had.
    setting = {**comparison.VALUES_BEFORE, **setting}
    found = {}
    for line in pathlib.Path(path).read_text("utf-8").splitlines():
        record = json.loads(line)
        own = record["setting"]
        if own["is_tuning"] or any(
            own.get(name, comparison.VALUES_BEFORE.get(name, value)) != value
            for name, value in setting.items()
        ):
            continue
        rates = found.setdefault(own["method"], {})
        rates.setdefault(own["learning_rate"], {})[own["seed"]] = record[
            "result"
        ]
    for method in methods or found:
        if len(found.get(method, {})) != 1:
            raise ValueError(
                f"`runs` must hold runs of `{method}` with the setting of the "
                "flags, and one learning rate. Received: learning rates "
                f"{sorted(found.get(method, {}))} in {path}"
            )
    return {m: next(iter(found[m].items())) for m in methods or found}


def mean_curve(runs):
    """`(steps, accuracies)`: the mean over the runs of a method.

    Args:
        runs: Seed to a result.
    """
    results = list(runs.values())
    return (
        np.array(results[0]["round"]),
        np.mean([result["accuracy"] for result in results], axis=0),
    )


def final(runs):
    """Seed to the accuracy after the last step."""
    return {seed: result["accuracy"][-1] for seed, result in runs.items()}


def gains(runs, others):
    """Points of accuracy between two methods, for the seeds of both."""
    ours, theirs = final(runs), final(others)
    return [100 * (ours[s] - theirs[s]) for s in ours if s in theirs]


def points(values):
    """The mean of points and its standard error, as text.

    >>> points([-1.0, -2.0, -3.0]), points([2.5]), points([])
    ('−2.0 ± 0.6', '+2.5', '')
    """  # noqa: RUF002  The minus sign of tables.
    if not values:
        return ""
    text = f"{np.mean(values):+.1f}".replace("-", "\N{MINUS SIGN}")
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"
    return text


def accuracy(values):
    """The mean of accuracies and their standard deviation, as text.

    >>> accuracy([0.5, 0.52]), accuracy([0.5])
    ('.510 ± .014', '.500')
    """

    def decimals(value):
        return f"{value:.3f}".lstrip("0")

    text = decimals(np.mean(values))
    if len(values) > 1:
        text += f" ± {decimals(np.std(values, ddof=1))}"
    return text


def markdown_table(splits, baseline):
    """Rows are methods; each split has its accuracy and the points.

    Args:
        splits: Split to what `read` has found.
        baseline: Method.
    """
    heading = "".join(f" {split} | from {baseline} |" for split in splits)
    lines = [
        f"| method |{heading}",
        f"| --- |{' ---: | ---: |' * len(splits)}",
    ]
    for method in dict.fromkeys(m for found in splits.values() for m in found):
        cells = []
        for found in splits.values():
            _, runs = found.get(method, (None, {}))
            _, others = found.get(baseline, (None, {}))
            cells += [
                accuracy(list(final(runs).values())) if runs else "",
                points(gains(runs, others)) if method != baseline else "",
            ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(splits, path):
    """Draws accuracy against steps, a panel for each split."""
    plt = example_utils.plt
    figure, axes = plt.subplots(
        *(1, len(splits)),
        figsize=(2 + 4.5 * len(splits), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (split, found) in zip(axes[0], splits.items(), strict=True):
        for method, (_, runs) in found.items():
            steps, _ = mean_curve(runs)
            curves = [result["accuracy"] for result in runs.values()]
            example_utils.plot_band(axis, steps, curves, method)
        axis.set_title(split)
        axis.set_xlabel("step")
    axes[0, 0].set_ylabel("test accuracy")
    # A method may lack a split.
    lines = {
        line.get_label(): line for axis in axes[0] for line in axis.get_lines()
    }
    axes[0, -1].legend(
        handles=list(lines.values()),
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
    )
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_split(path, setting, methods=()):
    """The split of the runs in a file, of which there is one, and the runs.

    Args:
        path: As of `read`, and so is the next.
        setting: See above.
        methods: Those that are read, where the file has them; empty for all.

    Returns:
        `(split, runs)`, the former as text.

    Raises:
        ValueError: As of `read`, and if there are runs of several splits.
    """
    lines = pathlib.Path(path).read_text("utf-8").splitlines()
    settings = [json.loads(line)["setting"] for line in lines]
    splits = {own["split"] for own in settings}
    if len(splits) != 1:
        raise ValueError(
            f"`runs` must hold runs of one split. Received: {sorted(splits)} "
            f"in {path}"
        )
    [split] = splits
    if not methods:
        return split, read(path, setting)
    there = {own["method"] for own in settings if not own["is_tuning"]}
    present = [method for method in methods if method in there]
    return split, read(path, setting, present) if present else {}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    setting = {
        name: getattr(args, name) for name in ("rounds", "inner_optimizer")
    }
    splits = dict(read_split(path, setting, args.methods) for path in args.runs)
    missing = set(args.methods).difference(*splits.values())
    if missing:
        raise app.UsageError(
            "`methods` must have runs in one of the files at least. "
            f"Received: {', '.join(sorted(missing))}"
        )
    print(markdown_table(splits, args.baseline))
    for pair in args.pairs:
        one, other = pair.split("-")
        for split, found in splits.items():
            if one in found and other in found:
                difference = points(gains(found[one][1], found[other][1]))
                print(f"{split}: {one} - {other}: {difference}")
    plot(splits, args.output)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
