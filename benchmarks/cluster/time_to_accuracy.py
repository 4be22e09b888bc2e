r"""Time to an accuracy: a study's accuracies, with the time of real steps.

`examples/studies/cifar10_long.py` trains with workers that are simulated in one
process, so its steps take other times than those of workers. Here each worker
is a process in a network namespace of its own, behind a shaped link, and takes
the steps of that study: with its network, shards, batches, optimizers and
learning rates. Needs root; see `step.py`.

    python -m benchmarks.cluster.time_to_accuracy --split=iid \
        --runs=docs/results/cifar10_long_iid/runs.jsonl \
        --methods=dense,topk_sign,shift_at_once_sign

For each network the median time of a step of each method is measured, in turn
within each round. The time to an accuracy is **composed**: the number of steps
after which the study's mean accuracy over the seeds reaches it, times the
median. `--whole=100mbit:dense` also takes all steps of a training, a part of
them before each round, so that a machine that becomes slower hurts both alike.
Their time and the accuracy are printed beside those that are composed. Composed
times mean little where the two differ by more than a tenth.
`--times=SUMMARY` composes the times of the steps that an earlier `summary.json`
has with the accuracies of `--runs`, and measures nothing.

Takes the flags of that study, which must be those of its runs, and the learning
rate of each method from these runs. The accuracy of `dense_float16`,
`powersgd1` and `powersgd4` is the study's; the time of a step is that of
PyTorch's hook, with a network of the same layers, where torch is installed.
"""

import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile

from absl import app
from absl import flags
import cifar10_long
import example_utils
import kept_runs
import numpy as np
import tqdm
import worker_data

from benchmarks.cluster import launcher
from benchmarks.cluster import namespaces
from benchmarks.cluster import report
from benchmarks.cluster import step
from benchmarks.cluster import study_worker

# Steps of a whole training between two answers of the workers, at most.
_STEPS_AT_ONCE = 100
# Flags that the time of a step depends on.
_OF_A_STEP = ("batch_size", "density", "model", "momentum", "num_workers")


def define_flags():
    cifar10_long.define_flags()
    flags.FLAGS.set_default("output_dir", "results/time_to_accuracy")
    flags.DEFINE_list("networks", ["unshaped", "1gbit", "100mbit", "5ms"], "")
    flags.DEFINE_integer("timed_rounds", 9, "Timed rounds.", lower_bound=1)
    flags.DEFINE_float("seconds_per_turn", 3.0, "Of a method in a round.")
    flags.DEFINE_integer(
        "timeout", 600, "Seconds that a worker may take to answer."
    )
    flags.DEFINE_string(
        "runs", "docs/results/cifar10_long_iid/runs.jsonl", "Of the study."
    )
    flags.DEFINE_list(
        "targets",
        ["0.9", "0.95", "0.99"],
        "Shares of the final accuracy of dense.",
    )
    flags.DEFINE_list(
        "whole", [], "NETWORK:METHOD of whole trainings, with the first seed."
    )
    flags.DEFINE_string("times", None, "The summary.json of measured steps.")
    # So that --help lists those too.
    flags.adopt_module_key_flags(cifar10_long)


def kind_of(method):
    """Which workers of `worker.py` take the steps of a method.

    >>> kind_of("topk_sign"), kind_of("powersgd1")
    ('study', 'torch_study')
    """
    return "torch_study" if method in study_worker.HOOKS else "study"


def steps_to(curve, accuracy):
    """The first step of a curve with at least an accuracy, or None.

    >>> steps_to(([10, 20, 30], np.array([0.1, 0.5, 0.4])), 0.4)
    20
    >>> steps_to(([10, 20, 30], np.array([0.1, 0.5, 0.4])), 0.6)
    """
    reached = np.flatnonzero(curve[1] >= accuracy)
    return int(curve[0][reached[0]]) if len(reached) else None


def milliseconds_of(records):
    """Method to the median time of a step, in one network."""
    return {m: record["milliseconds"] for m, record in records.items()}


def compose(curves, milliseconds, targets):
    """Times to shares of the final accuracy of dense training.

    Args:
        curves: Method to a curve, as of `kept_runs.mean_curve`; `dense` is
            among them.
        milliseconds: Method to the median time of a step.
        targets: List of shares.

    Returns:
        Method to a list of seconds, None where an accuracy is not reached.
    """
    final = curves["dense"][1][-1]
    found = {}
    for method, curve in curves.items():
        steps = [steps_to(curve, target * final) for target in targets]
        found[method] = [
            count and count * milliseconds[method] / 1e3 for count in steps
        ]
    return found


def markdown_table(summary):
    """Rows are methods; a network has a column for a step, one for targets."""
    networks = list(summary["records"])
    targets = " / ".join(f"{100 * target:g}" for target in summary["targets"])
    heading = "".join(
        f" {network}, ms a step | s to {targets} % |" for network in networks
    )
    lines = [f"| method |{heading}", f"| --- |{' ---: |' * 2 * len(networks)}"]
    for method in summary["methods"]:
        cells = []
        for network in networks:
            record = summary["records"][network][method]
            cells.append(f"{record['milliseconds']:.0f}")
            cells.append(
                " / ".join(
                    "-" if seconds is None else f"{seconds:,.0f}"
                    for seconds in summary["seconds"][network][method]
                )
            )
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


class Whole:
    """A training, all steps of which are taken.

    Args:
        method: Its method.
        workers: `Workers` of `StudyWorker`.
        num_steps: The number of steps.
        num_parts: The number of parts in which the steps are taken.
    """

    def __init__(self, method, workers, num_steps, num_parts):
        self._method, self._workers = f"whole:{method}", workers
        self._num_steps, self._num_parts = num_steps, num_parts
        self._seconds = []
        workers.ask(do="build", method=self._method, size=None, steps=0)

    def take_part(self, number):
        """Takes the steps of a part, the first of which is number 0."""
        end = (number + 1) * self._num_steps // self._num_parts
        with tqdm.tqdm(
            *(None, self._method),
            total=self._num_steps,
            initial=len(self._seconds),
            leave=False,
            mininterval=5,
        ) as progress:
            while (first := len(self._seconds)) < end:
                answers = self._workers.ask(
                    do="steps",
                    method=self._method,
                    first=first,
                    lead_in=0,
                    steps=min(_STEPS_AT_ONCE, end - first),
                )
                self._seconds += map(
                    max, zip(*(a["seconds"] for a in answers), strict=True)
                )
                progress.update(len(self._seconds) - first)

    def result(self):
        """Sums up what `take_part` has found.

        Returns:
            Dict: seconds of all steps but the first, which compiles the
            program; their median; and the accuracy.
        """
        [answer, *_] = self._workers.ask(do="test", method=self._method)
        return {
            "seconds": sum(self._seconds[1:]),
            "median_milliseconds": 1e3 * statistics.median(self._seconds),
            **answer,
        }


def save_data(folder, args):
    """Writes images and labels, once for all workers of this machine."""
    for split in ("train", "test"):
        images, labels = worker_data.load_images(
            "cifar10", split, args.data_dir, max_images=args.max_images
        )
        np.save(pathlib.Path(folder, f"{split}_images.npy"), images)
        np.save(pathlib.Path(folder, f"{split}_labels.npy"), labels)


def start_and_run(runs):
    """Makes the network, starts the workers, measures, and ends them.

    Args:
        runs: As of `kept_runs.read`.

    Returns:
        Dict: what was measured, where, and how.
    """
    args = flags.FLAGS
    summary = {
        "config": example_utils.config(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "records": {},
        "whole": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        save_data(folder, args)
        rates = {method: rate for method, (rate, _) in runs.items()}
        training = {
            "data": folder,
            "flags": example_utils.config(),
            "learning_rates": rates | {"local": rates["dense"]},
            "seed": int(args.seeds[0]),
        }
        with (
            namespaces.Network(args.num_workers) as network,
            launcher.Workers.start_all(
                # One thread for each kind, as in `step.py`.
                dict.fromkeys(map(kind_of, runs), 1),
                *(network, folder, args.timeout, training),
            ) as workers,
        ):
            for kind in workers.values():
                summary["machine"] |= kind.versions
            _time_steps(network, workers, list(runs), summary)
    return summary


def _time_steps(network, workers, methods, summary):
    """Adds to the summary the times of a step."""
    args = flags.FLAGS
    methods = [*methods, "local"]
    turns = len(args.networks) * len(methods) * (args.timed_rounds + 3)
    with tqdm.tqdm(total=turns, mininterval=1) as progress:
        for method in methods:
            progress.set_description(f"building {method}")
            [answer, *_] = workers[kind_of(method)].ask(
                do="build", method=method, size=None
            )
            summary["parameters"] = answer["parameters"]
        wholes = dict(whole.split(":", 1) for whole in args.whole)
        for name in args.networks:
            network.change(name)
            whole = None
            if name in wholes:
                whole = Whole(
                    *(wholes[name], workers["study"]),
                    *(args.rounds, args.timed_rounds),
                )
            summary["records"][name] = step.measure(
                methods,
                lambda method: workers[kind_of(method)],
                step.Pace(args.timed_rounds, args.seconds_per_turn),
                name,
                progress,
                whole.take_part if whole else lambda number: None,
            )
            if whole:
                summary["whole"][f"{name}:{wholes[name]}"] = whole.result()


def read_times(path, args):
    """The measurements of an earlier run, in the networks of the flags.

    Args:
        path: A `summary.json`.
        args: The flags.

    Returns:
        As of `start_and_run`.

    Raises:
        ValueError: If the steps were others, or if a method was not timed in
            one of the networks.
    """
    summary = json.loads(pathlib.Path(path).read_text("utf-8"))
    for name in _OF_A_STEP:
        if summary["config"][name] != args[name].value:
            raise ValueError(
                f"`{name}` must be that of the steps in `times`, "
                f"{summary['config'][name]}. Received: "
                f"{name}={args[name].value}"
            )
    timed = summary["records"]
    missing = [
        f"{name}:{method}"
        for name in args.networks
        for method in args.methods
        if method not in timed.get(name, {})
    ]
    if missing:
        raise ValueError(
            "`times` must hold the times of all networks and methods of the "
            f"flags. Received: {path} without {', '.join(missing)}"
        )
    return summary | {"records": {name: timed[name] for name in args.networks}}


def plot(summary, curves, path):
    """Draws accuracy against seconds, a panel for each network."""
    plt = example_utils.plt
    networks = list(summary["records"])
    figure, axes = plt.subplots(
        *(1, len(networks)),
        figsize=(1 + 3.5 * len(networks), 3.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, network in zip(axes[0], networks, strict=True):
        milliseconds = milliseconds_of(summary["records"][network])
        for method, (steps, accuracies) in curves.items():
            seconds = steps * milliseconds[method] / 1e3
            axis.plot(seconds, accuracies, **example_utils.style(method))
        axis.set_xscale("log")
        # Else the numbers between powers of ten overlap.
        axis.xaxis.set_minor_formatter("")
        axis.set_title(network, fontsize=10)
        axis.set_xlabel("seconds (composed)")
    axes[0, 0].set_ylabel("test accuracy")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_whole(summary):
    """Prints whole trainings beside what is composed."""
    for whole, found in summary["whole"].items():
        name, method = whole.split(":", 1)
        if method not in summary["records"].get(name, {}):
            continue  # A part of the times was asked for.
        milliseconds = milliseconds_of(summary["records"][name])[method]
        composed = summary["config"]["rounds"] * milliseconds / 1e3
        print(
            f"{whole}: {found['seconds']:.0f} s in all, composed "
            f"{composed:.0f} s; accuracy {found['accuracy']:.4f}, median step "
            f"{found['median_milliseconds']:.1f} ms"
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    names = [whole.partition(":")[0] for whole in args.whole]
    if len(set(names)) < len(names):
        raise app.UsageError(
            "`whole` must name each network once. "
            f"Received: {','.join(args.whole)}"
        )
    for whole in args.whole:
        name, _, method = whole.partition(":")
        if (
            name not in args.networks
            or method not in args.methods
            or kind_of(method) != "study"
        ):
            raise app.UsageError(
                "`whole` must name a network and a method that are timed, as "
                "100mbit:dense; PyTorch's steps are timed only. "
                f"Received: {whole}"
            )
    if "dense" not in args.methods:
        raise app.UsageError(
            "`methods` must hold dense, which the others are compared with. "
            f"Received: {','.join(args.methods)}"
        )
    if args.times and args.whole:
        raise app.UsageError(
            "`whole` needs a network, and `times` makes none: leave out one. "
            f"Received: whole={','.join(args.whole)}, times={args.times}"
        )
    for name in args.networks:
        namespaces.parse_condition(name)
    runs = kept_runs.read(
        args.runs, flags.FLAGS.flag_values_dict(), args.methods
    )
    if args.times:
        summary = read_times(args.times, args)
    else:
        if not importlib.util.find_spec("torch"):
            left_out = [m for m in runs if kind_of(m) == "torch_study"]
            runs = {m: run for m, run in runs.items() if m not in left_out}
            if left_out:
                print(f"Without {', '.join(left_out)}: torch is not installed.")
        if reason := namespaces.why_not():
            print(f"This benchmark cannot run here: {reason}.", file=sys.stderr)
            return 2
        summary = launcher.run_and_clean_up(start_and_run, runs)
        if summary is None:
            return 1
    report_all(summary, runs)
    return 0


def report_all(summary, runs):
    """Composes, and writes and prints what was found.

    Args:
        summary: As of `start_and_run`.
        runs: As of `kept_runs.read`.
    """
    args = flags.FLAGS
    curves = {
        method: kept_runs.mean_curve(of_seeds)
        for method, (_, of_seeds) in runs.items()
    }
    targets = [float(target) for target in args.targets]
    summary |= {
        "methods": list(runs),
        "targets": targets,
        "seconds": {
            name: compose(curves, milliseconds_of(records), targets)
            for name, records in summary["records"].items()
        },
    }
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "summary.json"), "w") as f:
        json.dump(summary, f, indent=2)
    plot(summary, curves, os.path.join(args.output_dir, "time.png"))
    records = [
        {
            "network": name,
            "size": summary["parameters"],
            "method": method,
            **record,
        }
        for name, of_network in summary["records"].items()
        for method, record in of_network.items()
    ]
    report.compare(records)
    print(report.text_table(records))
    print(markdown_table(summary))
    print_whole(summary)
    print(f"Wrote summary.json and time.png in {args.output_dir}.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
