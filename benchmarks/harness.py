"""What the benchmarks share: rounds, multiples of F, tables and figures.

Every method runs in each round, in turn, so that a busy machine hurts all
alike: once for the state the caches are in, and once timed. Times are medians,
as multiples of F measured in the same rounds: one pass over the gradient, on a
CPU `np.add(g, e, out=a)` on one thread, on a GPU one copy.
"""

import json
import os
import platform
import statistics
import time

from absl import app
from absl import flags
import matplotlib
import numpy as np
import tensorflow as tf
import tqdm

matplotlib.use("Agg")  # Writes files; needs no display.
from matplotlib import pyplot as plt

FLOOR = "F"
# A method slower than this runs in every fifth round only.
_SLOW_SECONDS = 0.5


def define_flags(output_dir):
    """Defines the flags of every benchmark; `output_dir` is a default."""
    flags.DEFINE_list(
        "sizes", ["1000000", "11200000", "25600000"], "Values of J."
    )
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_integer("rounds", 15, "Timed rounds.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 3, "Rounds before those.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the gradients.", lower_bound=0)
    flags.DEFINE_string("output_dir", output_dir, "Where the results go.")


def cells():
    """`(J, density, k)` of each cell that the flags ask for."""
    for size in map(int, flags.FLAGS.sizes):
        for density in map(float, flags.FLAGS.densities):
            yield size, density, max(1, round(density * size))


def run(methods_for, title, output_dir):
    """Runs a benchmark: every cell, and the report of all.

    Args:
        methods_for: Function of a gradient, the density, k and a NumPy
            generator that returns the methods, as for `measure`.
        title: Of the figure.
        output_dir: Default of the flag.
    """

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {argv[1:]}")
        rng = np.random.default_rng(flags.FLAGS.seed)
        results = []
        for size, density, k in cells():
            gradient = make_gradient(size, rng)
            results += measure(
                methods_for(gradient, density, k, rng), size, density
            )
        report(results, title)

    define_flags(output_dir)
    app.run(main)


def make_gradient(size, rng):
    """Normal entries in 60 layers whose scales differ."""
    layer = np.arange(size) * 60 // size
    scale = np.exp(rng.standard_normal(60))[layer]
    return (rng.standard_normal(size) * scale).astype(np.float32)


def variable_sizes(size, num_layers=60):
    """Kernels that grow with depth as in a network, each with a bias of 64."""
    growth = np.geomspace(1, 100, num_layers)
    layers = (growth / growth.sum() * size // 64 * 64).astype(int).tolist()
    sizes = [n for layer in layers if layer > 64 for n in (layer - 64, 64)]
    return [*sizes, size - sum(sizes)]


def floor(gradient):
    """The pass over the gradient that all else is a multiple of."""
    if tf.config.list_logical_devices("GPU"):
        on_device = tf.constant(gradient)
        return compiled(lambda: on_device + 1.0)
    error, out = gradient[::-1].copy(), np.empty_like(gradient)
    return lambda: np.add(gradient, error, out=out)


def compiled(function, jit_compile=True):
    """`function` as one that a GPU has finished when it returns."""
    function = tf.function(function, jit_compile=jit_compile, autograph=False)
    if not tf.config.list_logical_devices("GPU"):
        return function

    def synchronized(*args):
        outputs = function(*args)
        tf.test.experimental.sync_devices()
        return outputs

    return synchronized


def measure(methods, size, density):
    """Runs the methods in turn, and returns one record for each.

    Args:
        methods: Dict from name to function of no arguments; one is `FLOOR`.
        size: J, for the records and the progress bar.
        density: As `size`.

    Returns:
        List of dicts.
    """
    args = flags.FLAGS
    first, seconds = {}, {name: [] for name in methods}
    for r in tqdm.trange(
        args.warm_up + args.rounds, desc=f"J={size} density={density:g}"
    ):
        for name, method in methods.items():
            if not r:
                first[name] = seconds_of(method)
            is_slow = min(seconds[name] or [first[name]]) > _SLOW_SECONDS
            if is_slow and r % 5:
                continue
            if not is_slow:
                method()
            elapsed = seconds_of(method)
            if r >= args.warm_up or is_slow:
                seconds[name].append(elapsed)
    unit = statistics.median(seconds[FLOOR])
    return [
        {
            "size": size,
            "density": density,
            "method": name,
            "milliseconds": 1e3 * statistics.median(values or [first[name]]),
            "multiple_of_F": statistics.median(values or [first[name]]) / unit,
            "multiple_of_F_10_to_90_percent": [
                float(p) / unit
                for p in np.percentile(values or [first[name]], [10, 90])
            ],
            "first_call_seconds": first[name],
        }
        for name, values in seconds.items()
    ]


def seconds_of(method):
    start = time.perf_counter()
    method()
    return time.perf_counter() - start


def report(results, title):
    """Prints the results, and writes `summary.json` and `figure.png`."""
    print(
        f"\n{'J':>10} {'k / J':>6} {'method':28} {'ms':>9} {'x F':>7}  10-90 %"
    )
    for r in results:
        low, high = r["multiple_of_F_10_to_90_percent"]
        print(
            f"{r['size']:10} {r['density']:6g} {r['method']:28} "
            f"{r['milliseconds']:9.2f} {r['multiple_of_F']:7.2f}  "
            f"{low:.2f}-{high:.2f}"
        )
    output_dir = flags.FLAGS.output_dir
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"machine": _machine(), "results": results}, f, indent=2)
    _plot(results, title, os.path.join(output_dir, "figure.png"))
    print(f"Wrote {path} and figure.png beside it.")


def _machine():
    gpus = [
        tf.config.experimental.get_device_details(gpu).get("device_name")
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
    }


def _plot(results, title, path):
    sizes = list(dict.fromkeys(r["size"] for r in results))
    densities = list(dict.fromkeys(r["density"] for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    methods.remove(FLOOR)
    figure, axes = plt.subplots(
        1,
        len(sizes),
        figsize=(1 + 4 * len(sizes), 1 + 0.45 * len(methods)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    height = 0.8 / len(densities)
    for size, axis in zip(sizes, axes[0], strict=True):
        for i, density in enumerate(densities):
            found = {
                r["method"]: r["multiple_of_F"]
                for r in results
                if (r["size"], r["density"]) == (size, density)
            }
            axis.barh(
                [y + i * height for y in range(len(methods))],
                [found.get(method, 0) for method in methods],
                height,
                label=f"density {density:g}",
            )
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"J = {size:,}")
        axis.set_xlabel("multiples of F")
    axes[0, 0].set_yticks(
        [y + 0.4 - height / 2 for y in range(len(methods))], methods
    )
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
