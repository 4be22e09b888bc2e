r"""How long it takes to select the k largest of J entries, exactly.

Against what else finds them: `tf.math.top_k` and `np.argpartition`, and where
PyTorch is installed `torch.topk` and a whole `torch.sort`. These are given the
magnitudes; ours makes them itself. A second time it selects in each of some 120
variables separately, as with `scope="per_variable"`.

    python -m benchmarks.kernels.selection --sizes=1000000,11200000
"""

from absl import flags
import numpy as np
import tensorflow as tf

from benchmarks import harness
from tf_regtopk import selection

try:
    import torch
except ImportError:
    torch = None


flags.DEFINE_boolean("peers", True, "Whether others are timed as well.")


def methods_for(gradient, density, k, rng):
    """Name to function, each running to its end; all select the same."""
    del rng
    tensor, magnitudes = tf.constant(gradient), np.abs(gradient)
    steps = iter(range(2**31))

    def ours(groups):
        select = harness.compiled(
            lambda step: selection.select_largest(tensor, groups, step)
        )
        return lambda: select(tf.constant(next(steps)))

    tf_magnitudes = tf.constant(magnitudes)

    def top_k():
        return tf.math.top_k(tf_magnitudes, k, sorted=False)[1]

    methods = {
        harness.FLOOR: harness.floor(gradient),
        "tf_regtopk": ours([selection.Group(len(gradient), k)]),
        "tf_regtopk, by variable": ours(
            [
                selection.Group(size, max(1, round(density * size)))
                for size in harness.variable_sizes(len(gradient))
            ]
        ),
    }
    check_selects_the_largest(methods["tf_regtopk"], magnitudes, k)
    if not flags.FLAGS.peers:
        return methods
    methods |= {
        "tf.math.top_k": harness.compiled(top_k, jit_compile=False),
        "tf.math.top_k, XLA": harness.compiled(top_k),
        "np.argpartition": lambda: np.argpartition(magnitudes, -k)[-k:],
    }
    if torch:
        torch_magnitudes = torch.from_numpy(magnitudes)
        methods["torch.topk"] = lambda: torch.topk(
            torch_magnitudes, k, sorted=False
        )
        methods["torch.sort"] = lambda: torch.sort(torch_magnitudes)
    return methods


def check_selects_the_largest(select, magnitudes, k):
    expected = np.sort(np.partition(magnitudes, -k)[-k:])
    actual = np.sort(magnitudes[select().numpy()])
    np.testing.assert_array_equal(actual, expected)


if __name__ == "__main__":
    harness.run(
        methods_for, "Selecting the k largest of J entries", "results/selection"
    )
