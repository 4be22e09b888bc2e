r"""How long it takes to select the k largest of J entries, exactly.

Against what else finds them: `tf.math.top_k` and `np.argpartition`, and where
PyTorch is installed `torch.topk` and a whole `torch.sort`. These are given the
magnitudes; ours makes them itself.

    python benchmarks/selection.py --sizes=1000000,11200000
"""

from absl import app
from absl import flags
import benchmark_utils
import numpy as np
import tensorflow as tf

from tf_regtopk import selection

try:
    import torch
except ImportError:
    torch = None


def methods_for(gradient, k):
    """Name to function, each running to its end; all select the same."""
    tensor, magnitudes = tf.constant(gradient), np.abs(gradient)
    groups = [selection.Group(len(gradient), k)]
    ours = benchmark_utils.compiled(
        lambda step: selection.select_largest(tensor, groups, step)
    )
    steps = iter(range(2**31))

    tf_magnitudes = tf.constant(magnitudes)

    def top_k():
        return tf.math.top_k(tf_magnitudes, k, sorted=False)[1]

    methods = {
        benchmark_utils.FLOOR: benchmark_utils.floor(gradient),
        "tf_regtopk": lambda: ours(tf.constant(next(steps))),
        "tf.math.top_k": benchmark_utils.compiled(top_k, jit_compile=False),
        "tf.math.top_k, XLA": benchmark_utils.compiled(top_k),
        "np.argpartition": lambda: np.argpartition(magnitudes, -k)[-k:],
    }
    if torch:
        torch_magnitudes = torch.from_numpy(magnitudes)
        methods["torch.topk"] = lambda: torch.topk(
            torch_magnitudes, k, sorted=False
        )
        methods["torch.sort"] = lambda: torch.sort(torch_magnitudes)
    return methods


def check_selects_the_largest(methods, gradient):
    magnitudes = np.abs(gradient)
    expected = np.sort(magnitudes[methods["np.argpartition"]()])
    actual = np.sort(magnitudes[methods["tf_regtopk"]().numpy()])
    np.testing.assert_array_equal(actual, expected)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    rng = np.random.default_rng(flags.FLAGS.seed)
    results = []
    for size, density, k in benchmark_utils.cells():
        gradient = benchmark_utils.make_gradient(size, rng)
        methods = methods_for(gradient, k)
        check_selects_the_largest(methods, gradient)
        results += benchmark_utils.measure(methods, size, density)
    benchmark_utils.report(results, "Selecting the k largest of J entries")


if __name__ == "__main__":
    benchmark_utils.define_flags("results/selection")
    app.run(main)
