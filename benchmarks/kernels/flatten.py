r"""How long it takes to join the gradients and add the error to them.

By XLA in one program, and by TensorFlow and XLA one after the other, for the
network of `benchmarks/cluster`. It depends on the number of threads, and with
several on where in memory the gradients lie.

    python -m benchmarks.kernels.flatten --sizes=11000000 --densities=1 \
        --threads=2
"""

from absl import flags
import numpy as np
import tensorflow as tf

from benchmarks import harness
from benchmarks.cluster import methods as cluster_methods
from tf_regtopk.error_feedback import equations

flags.DEFINE_integer(
    "threads", 0, "Threads of an operation; 0: one a core.", lower_bound=0
)


def methods_for(gradient, density, k, rng):
    """Name to function, of which each makes the accumulated gradient."""
    del density, k, rng
    tf.config.threading.set_intra_op_parallelism_threads(flags.FLAGS.threads)
    gradients = [
        tf.random.normal(shape)
        for shape in cluster_methods.shapes(len(gradient))
    ]
    vectors = [tf.reshape(g, [-1]) for g in gradients]
    error = tf.random.normal([sum(v.shape[0] for v in vectors)])

    def in_xla():
        return equations.accumulate(error, tf.concat(vectors, axis=0))

    accumulate = harness.compiled(equations.accumulate)

    def joined_before():
        return accumulate(error, tf.concat(vectors, axis=0))

    methods = {
        harness.FLOOR: harness.floor(gradient),
        "all in XLA": harness.compiled(in_xla),
        "joined before": harness.compiled(joined_before, jit_compile=False),
    }
    np.testing.assert_array_equal(
        methods["all in XLA"](), methods["joined before"]()
    )
    return methods


if __name__ == "__main__":
    harness.run(
        methods_for, "Joining gradients and the error", "results/flatten"
    )
