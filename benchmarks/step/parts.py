r"""How long each part of a step takes, from the gradients to the aggregate.

* `step`: a step of the library on the flat gradient of one replica, without
  the inner optimizer: accumulate, score, select, encode, check, decode, sum,
  remember, and clear the error.
* `sum of 8`: the entries of 8 replicas into one dense gradient.
* `flatten`, `split`: the variables' gradients to one vector and back.
* `apply`: a whole update of all variables by the optimizer with one replica,
  also with the parts of `methods.recommended`, and by plain SGD and Adam.

    python -m benchmarks.step.parts --sizes=11200000
"""

import keras
import numpy as np
import tensorflow as tf

from benchmarks import harness
import tf_regtopk
from tf_regtopk import error_feedback
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import topology
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.steps import flat_buffer
from tf_regtopk.steps import round as round_lib
from tf_regtopk.steps import sparse_step as sparse_step_lib
from tf_regtopk.steps import verdict


def replica_step(sparsifier, gradient):
    """A function that takes one replica's step after the other.

    The library's own, with one participant: header, checks and the sum of the
    entries included.
    """
    size = len(gradient)
    g = tf.constant(gradient)
    rule = tf_regtopk.Accumulate()
    buffer = flat_buffer.FlatBuffer(((size,),), (g.dtype,))
    groups = buffer.groups("global", sparsifier.num_selected)
    k = groups[0].k
    # As an entry takes no time to be written: see benchmarks/kernels/codecs.py.
    codec = tf_regtopk.Codec("int32", "float32").payload(k, size)
    feedback = replica_state.ReplicaState(
        lambda: rule.initial_local(size, g.dtype)
    )
    memory = replica_state.ReplicaState(
        lambda: sparsifier.initial_memory(k, size, g.dtype)
    )
    sparse_step = sparse_step_lib.SparseStep(
        buffer,
        round_lib.Method(sparsifier, rule, codec, groups),
        topology.Participants(),
        round_lib.State(feedback.dtypes, (), memory.dtypes),
    )
    state = round_lib.State(feedback.variables(), (), memory.variables())
    num_steps = tf.Variable(0, dtype=tf.int64)

    def step():
        progress = error_feedback.Progress(
            tf.zeros([]), num_steps.assign_add(1)
        )
        flags, exchanged = sparse_step.exchange([g], state, progress)
        with tf.control_dependencies([verdict.is_taken([flags])]):
            exchanged = tf.nest.map_structure(tf.identity, exchanged)
        return sparse_step.aggregate(exchanged, state, progress, (True,))

    return harness.compiled(step, jit_compile=False)


def sum_of_workers(size, k, rng, num_workers=8):
    indices = np.stack(
        [
            np.sort(rng.choice(size, k, replace=False, shuffle=False))
            for _ in range(num_workers)
        ]
    )
    indices = tf.constant(indices, tf.int32)
    values = tf.constant(rng.standard_normal(indices.shape), tf.float32)
    return harness.compiled(
        lambda: scatter_sum.sum_entries(indices, values, size)
    )


def parts_of(gradient, sizes):
    return [tf.constant(p) for p in np.split(gradient, np.cumsum(sizes)[:-1])]


def apply(optimizer, gradient, sizes):
    gradients = parts_of(gradient, sizes)
    variables = [keras.Variable(tf.zeros_like(g)) for g in gradients]
    optimizer.build(variables)
    return harness.compiled(
        lambda: optimizer.apply(gradients, variables), jit_compile=False
    )


def methods_for(gradient, density, k, rng):
    size = len(gradient)
    sizes = harness.variable_sizes(size)
    buffer = flat_buffer.FlatBuffer(
        tuple((n,) for n in sizes), (tf.float32,) * len(sizes)
    )
    parts, flat = parts_of(gradient, sizes), tf.constant(gradient)
    return {
        harness.FLOOR: harness.floor(gradient),
        "step, TopK": replica_step(tf_regtopk.TopK(density), gradient),
        "step, RegTopK": replica_step(tf_regtopk.RegTopK(density), gradient),
        "sum of 8": sum_of_workers(size, k, rng),
        "flatten": harness.compiled(
            lambda: tf.concat(buffer.vectors(parts), axis=0), jit_compile=False
        ),
        "split": harness.compiled(
            lambda: buffer.split(flat), jit_compile=False
        ),
        **{
            f"apply, {name}": apply(optimizer, gradient, sizes)
            for name, optimizer in optimizers(density).items()
        },
    }


def optimizers(density):
    def sparsified(sparsifier, **options):
        return tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(), sparsifier, **options
        )

    def recommended(rule):
        return sparsified(
            tf_regtopk.RegTopK(density),
            error_feedback=rule,
            codec=tf_regtopk.Codec(values="sign"),
        )

    shift = tf_regtopk.LearnedShift
    return {
        "TopK": sparsified(tf_regtopk.TopK(density)),
        "RegTopK": sparsified(tf_regtopk.RegTopK(density)),
        "recommended, SGD": recommended(shift(momentum=0.9, at_once=True)),
        "recommended, Adam": recommended(tf_regtopk.LocalAdam(shift())),
        "SGD": keras.optimizers.SGD(),
        "SGD, momentum": keras.optimizers.SGD(momentum=0.9),
        "Adam": keras.optimizers.Adam(),
    }


if __name__ == "__main__":
    harness.run(methods_for, "The parts of a step", "results/step")
