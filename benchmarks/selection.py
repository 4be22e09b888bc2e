r"""How long it takes to select the k largest of J scores, exactly.

Every method runs once a round, in turn, so that a busy machine hurts all alike.
Times are multiples of F, one pass over the gradient on one thread
(`np.add(g, e, out=a)`), measured in the same rounds.

    python benchmarks/selection.py --sizes=1000000,11200000
"""

import json
import os
import statistics
import time

from absl import app
from absl import flags
import numpy as np
import tensorflow as tf
import tqdm

from tf_regtopk import selection


def define_flags():
    flags.DEFINE_list("sizes", ["1000000", "11200000"], "Values of J.")
    flags.DEFINE_list("densities", ["0.001", "0.01", "0.1"], "Values of k / J.")
    flags.DEFINE_integer("rounds", 15, "Timed rounds.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Rounds before those.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the scores.", lower_bound=0)
    flags.DEFINE_string(
        "output_dir", "results/selection", "Where the results go."
    )


def make_scores(size, rng):
    """Magnitudes in 60 layers whose scales differ."""
    layer = np.arange(size) * 60 // size
    scale = np.exp(rng.standard_normal(60))[layer]
    return np.abs(rng.standard_normal(size) * scale).astype(np.float32)


def methods_for(scores, k):
    """Name to function of the round's number, each running to its end."""
    tensor = tf.constant(scores)
    groups = [selection.Group(len(scores), k)]
    ours = tf.function(
        lambda step: selection.select_largest(tensor, groups, step),
        jit_compile=True,
        autograph=False,
    )
    top_k = tf.function(
        lambda: tf.math.top_k(tensor, k, sorted=False), autograph=False
    )
    out = np.empty_like(scores)
    methods = {
        "F": lambda step: np.add(scores, scores, out=out),
        "tf_regtopk": lambda step: ours(step).numpy(),
        "tf.math.top_k": lambda step: top_k()[1].numpy(),
        "np.argpartition": lambda step: np.argpartition(scores, -k)[-k:],
    }
    largest = np.sort(methods["np.argpartition"](0))
    np.testing.assert_array_equal(
        np.sort(scores[methods["tf_regtopk"](tf.constant(0))]),
        np.sort(scores[largest]),
    )
    return methods


def measure(methods, warm_up, rounds, title):
    """Seconds of each timed round, by method."""
    seconds = {name: [] for name in methods}
    for r in tqdm.trange(warm_up + rounds, desc=title):
        step = tf.constant(r)
        for name, method in methods.items():
            start = time.perf_counter()
            method(step)
            if r >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    rng = np.random.default_rng(args.seed)
    results = []
    for size in map(int, args.sizes):
        scores = make_scores(size, rng)
        for density in map(float, args.densities):
            k = max(1, round(density * size))
            seconds = measure(
                methods_for(scores, k),
                args.warm_up,
                args.rounds,
                f"J={size} k={k}",
            )
            floor = statistics.median(seconds["F"])
            for name, values in seconds.items():
                low, median, high = np.percentile(values, [10, 50, 90])
                results.append(
                    {
                        "size": size,
                        "density": density,
                        "method": name,
                        "milliseconds": 1e3 * median,
                        "multiple_of_F": median / floor,
                        "multiple_of_F_10_to_90_percent": [
                            low / floor,
                            high / floor,
                        ],
                    }
                )

    print(
        f"\n{'J':>10} {'k / J':>6} {'method':16} {'ms':>8} {'x F':>7}  10-90 %"
    )
    for r in results:
        low, high = r["multiple_of_F_10_to_90_percent"]
        print(
            f"{r['size']:10} {r['density']:6g} {r['method']:16} "
            f"{r['milliseconds']:8.2f} {r['multiple_of_F']:7.1f}  "
            f"{low:.1f}-{high:.1f}"
        )
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"cores": os.cpu_count(), "results": results}, f, indent=2)
    print(f"Wrote {path}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
