"""Methods compared: tuned alike, run over seeds, kept on disk, reported."""

import json
import os
import pathlib
import sys

from absl import flags
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import example_utils
import methods
import powersgd
import shift_variants
import worker_data

import tf_regtopk

methods.METHODS.update(shift_variants.METHODS)
methods.METHODS.update(
    {
        f"{name}_owners{'' if keep == 1 else keep}": (
            lambda h, method=methods.METHODS[name], keep=keep: method(
                h.with_owners(keep=keep)
            )
        )
        for name in ("topk", "regtopk", "shift_regtopk", "shift_masked")
        for keep in (1, 4)
    }
)
methods.METHODS.update(
    {
        f"{name}_sign": lambda h, method=method: method(h.with_signs())
        for name, method in methods.METHODS.items()
        if not name.startswith("dense")
    }
)
methods.METHODS.update(powersgd.METHODS)
# A peer as well: all entries, in half the bytes.
methods.METHODS["dense_float16"] = lambda h: h._replace(
    codec=tf_regtopk.Codec(values="float16")
).sparsified(tf_regtopk.Dense(), tf_regtopk.NoFeedback(), h.momentum)

# Flags that say which runs there are, and nothing about each.
_NOT_OF_A_RUN = (
    "baseline",
    "data_dir",
    "learning_rates",
    "methods",
    "output_dir",
    "seeds",
    "tuning_rounds",  # Counts as `rounds` of the runs that it is for.
    "tuning_seeds",
)
# Of flags that came later, the value of the runs from before.
VALUES_BEFORE = {
    "inner_optimizer": "sgd",
    "look_ahead": "none",
    "density_phases": 1,
}
# What most comparisons lack: the same without error feedback, and others'
# answers to its weakness.
_METHODS = (
    "dense",
    "topk_no_feedback",
    "topk",
    "regtopk",
    "dgc",
    "ef21",
    "shift_regtopk",
)


def define_flags(output_dir, learning_rates, batch_size, rounds):
    """Defines the flags of a comparison; the arguments are defaults."""
    worker_data.define_flags()
    flags.DEFINE_integer("num_workers", 8, "Number of workers.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", batch_size, "Images a worker and step.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", rounds, "Number of steps.", lower_bound=1)
    flags.DEFINE_integer(
        "evaluate_every", 250, "Steps between tests.", lower_bound=1
    )
    flags.DEFINE_list(
        "learning_rates",
        [str(rate) for rate in learning_rates],
        "Learning rates, of which each method takes the one that suits it "
        "best on images held out.",
    )
    flags.DEFINE_float(
        "momentum", 0.9, "Momentum.", lower_bound=0.0, upper_bound=0.999
    )
    flags.DEFINE_enum(
        "inner_optimizer",
        "sgd",
        ["sgd", "adam"],
        "What applies the aggregate; Adam needs --momentum=0.",
    )
    flags.register_multi_flags_validator(
        ["inner_optimizer", "momentum"],
        lambda f: f["inner_optimizer"] == "sgd" or not f["momentum"],
        "--inner_optimizer=adam has a momentum of its own: use --momentum=0",
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds of weights, shards and batches.")
    flags.DEFINE_list(
        "tuning_seeds", ["1000"], "Seeds of the runs that compare these rates."
    )
    example_utils.define_density_flag(0.001)
    methods.define_method_flags(mu=4.0, methods=_METHODS)
    flags.DEFINE_string(
        "baseline", "topk", "The method that the others are compared with."
    )
    flags.DEFINE_string("output_dir", output_dir, "Where the results go.")
    # So that who adopts these flags adopts those too.
    flags.adopt_module_key_flags(worker_data)
    flags.adopt_module_key_flags(methods)


def run(train, args):
    """Runs what has not been run yet.

    Args:
        train: Function of `is_tuning` (whether to test on training images held
            out), `method`, `learning_rate` and `seed`. It returns a dictionary
            of the lists `round` and `accuracy`, and of `bytes_a_step`; where
            workers have weights of their own, also of the list `own_accuracy`.
        args: The flags.

    Returns:
        Method to a dictionary of its learning rate, its tuning runs, and its
        runs by seed.
    """
    rates = [float(rate) for rate in args.learning_rates]
    seeds = [int(seed) for seed in args.seeds]
    tuning_seeds = [int(seed) for seed in args.tuning_seeds]

    def run_once(method, rate, seed, is_tuning):
        setting = {"method": method, "learning_rate": rate, "seed": seed}
        return _cached(
            {"is_tuning": is_tuning, **setting, **methods.version(method)},
            args,
            lambda: train(is_tuning=is_tuning, **setting),
        )

    def tuned(method, rate):
        """Mean accuracy over the seeds for tuning."""
        runs = (run_once(method, rate, seed, True) for seed in tuning_seeds)
        return float(np.mean([run["accuracy"][-1] for run in runs]))

    results = {}
    for method in args.methods:
        tuning = {}
        if len(rates) > 1:
            tuning = {rate: tuned(method, rate) for rate in rates}
        results[method] = {
            "learning_rate": max(rates, key=tuning.get) if tuning else rates[0],
            "tuning": {str(rate): value for rate, value in tuning.items()},
            "runs": {},
        }
    for seed in seeds:
        for method, result in results.items():
            result["runs"][str(seed)] = run_once(
                method, result["learning_rate"], seed, False
            )
    return results


def report(results, args, title):
    """Prints a table, and writes the summary and the figure."""
    print(f"\n{title}, {args.rounds} rounds, seeds {', '.join(args.seeds)}")
    runs_have_own = all(
        "own_accuracy" in run
        for result in results.values()
        for run in result["runs"].values()
    )
    print(
        f"{'method':20} {'rate':>6} {'bytes/step':>10} {'accuracy':>8} "
        f"{'std':>6}  {'against ' + args.baseline:>15}"
        + ("  workers' own" if runs_have_own else "")
    )
    summary = {}
    for method, result in results.items():
        runs = list(result["runs"].values())
        final = np.array([run["accuracy"][-1] for run in runs])
        summary[method] = {
            **result,
            "accuracy": float(final.mean()),
            "accuracy_std": _std(final),
        }
        print(
            f"{method:20} {result['learning_rate']:6g} "
            f"{runs[0]['bytes_a_step']:10,} {final.mean():8.4f} "
            f"{_std(final):6.4f}  "
            f"{_difference(results, method, args.baseline):17}"
            + (f"  {_final_own(runs):12.4f}" if runs_have_own else "")
        )
        if runs_have_own:
            summary[method]["own_accuracy"] = _final_own(runs)

    def draw(by_step, by_bytes):
        for method, result in results.items():
            runs = list(result["runs"].values())
            curves = np.array([run["accuracy"] for run in runs])
            rounds = np.array(runs[0]["round"])
            megabytes = rounds * runs[0]["bytes_a_step"] / 1e6
            for axes, x in ((by_step, rounds), (by_bytes, megabytes)):
                colour = example_utils.plot_band(axes, x, curves, method)
                if runs_have_own:
                    example_utils.plot_band(
                        axes,
                        x,
                        [run["own_accuracy"] for run in runs],
                        method,
                        color=colour,
                        dashes=(1, 2),
                        linewidth=1,
                        label=None,
                    )
        by_step.set_xlabel("step")
        by_step.set_ylabel(
            "test accuracy (thin: workers' own)"
            if runs_have_own
            else "test accuracy"
        )
        # Beside the curves, which it would hide.
        by_bytes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        by_step.set_title(title)
        by_bytes.set_xlabel("megabytes sent by a worker")
        by_bytes.set_xscale("log")

    example_utils.save_results(
        args.output_dir,
        {"config": example_utils.config(), "methods": summary},
        draw,
        num_plots=2,
    )


def _final_own(runs):
    """Mean accuracy of the workers' own weights at the end."""
    return float(np.mean([run["own_accuracy"][-1] for run in runs]))


def _difference(results, method, baseline):
    """Mean and standard error over seeds of the gain over another, in text."""
    if method == baseline or baseline not in results:
        return ""
    others = results[baseline]["runs"]
    gains = np.array(
        [
            run["accuracy"][-1] - others[seed]["accuracy"][-1]
            for seed, run in results[method]["runs"].items()
        ]
    )
    error = _std(gains) / len(gains) ** 0.5
    return f"{gains.mean():+.4f} +- {error:.4f}"


def _std(values):
    """The standard deviation of what the values are a sample of."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def shared_setting(config):
    """What all runs of a comparison are kept under, of the values of its flags.

    Args:
        config: Dictionary of the flags of the script.

    Returns:
        Dictionary.
    """
    return {
        name: value
        for name, value in config.items()
        if name not in _NOT_OF_A_RUN
        and (name, value) not in VALUES_BEFORE.items()
    }


def _cached(setting, args, compute):
    """The result of a run, from disk if it is there."""
    config = example_utils.config()
    if setting["is_tuning"] and "tuning_rounds" in config:
        config["rounds"] = config["tuning_rounds"]
    setting = {**shared_setting(config), **setting}
    path = os.path.join(args.output_dir, "runs.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for record in map(json.loads, f):
                if record["setting"] == setting:
                    return record["result"]
    result = compute()
    os.makedirs(args.output_dir, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps({"setting": setting, "result": result}) + "\n")
    return result
