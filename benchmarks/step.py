r"""How long each part of a step takes, from the gradients to the aggregate.

* `step`: one replica's own work on the flat gradient: accumulate, score,
  select, encode, and clear the error.
* `sum of 8`: the entries of 8 replicas into one dense gradient.
* `flatten`, `split`: the variables' gradients to one vector and back.
* `apply`: a whole update of all variables by the optimizer with one replica,
  and by plain SGD.

    python benchmarks/step.py --sizes=11200000
"""

import benchmark_utils
import keras
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk import selection
from tf_regtopk.error_feedback import equations
from tf_regtopk.kernels import scatter_sum
from tf_regtopk.steps import flat_buffer


def replica_step(sparsifier, gradient):
    """A function that takes one replica's step after the other."""
    size = len(gradient)
    groups = [selection.Group(size, sparsifier.num_selected(size))]
    g = tf.constant(gradient)
    error = tf.Variable(tf.zeros([size]))
    memory = [
        tf.Variable(value)
        for value in sparsifier.initial_memory(groups[0].k, g.dtype)
    ]
    num_steps = tf.Variable(0)
    # As an entry takes no time to be written: see benchmarks/codecs.py.
    codec = tf_regtopk.Codec("int32", "float32").payload(groups[0].k, size)

    @tf.function(jit_compile=True, autograph=False)
    def select_entries(e, memory, step):
        a = equations.accumulate(e, g)
        scores = sparsifier.score(a, memory, step)
        indices = selection.select_largest(scores, groups, step)
        a = sparsifier.restore(a, scores, memory, indices)
        payload, sent = codec.encode(indices, tf.gather(a, indices), (step, 0))
        return a, indices, payload, sent

    @tf.function(jit_compile=True, autograph=False)
    def clear(error, indices, sent):
        a = error.read_value()
        error.assign(equations.residual_error(a, indices, sent))

    def step():
        a, indices, payload, sent = select_entries(
            error.read_value(),
            [variable.read_value() for variable in memory],
            num_steps.assign_add(1),
        )
        error.assign(a)
        # As if the others had sent nothing for half of the entries.
        summed = tf.where(tf.range(groups[0].k) % 2 == 0, sent, 2 * sent)
        remembered = sparsifier.remember(indices, sent, summed)
        for variable, value in zip(memory, remembered, strict=True):
            variable.assign(value)
        clear(error, indices, sent)
        return payload

    return benchmark_utils.compiled(step, jit_compile=False)


def sum_of_workers(size, k, rng, num_workers=8):
    indices = np.stack(
        [
            np.sort(rng.choice(size, k, replace=False, shuffle=False))
            for _ in range(num_workers)
        ]
    )
    indices = tf.constant(indices, tf.int32)
    values = tf.constant(rng.standard_normal(indices.shape), tf.float32)
    return benchmark_utils.compiled(
        lambda: scatter_sum.sum_entries(indices, values, size)
    )


def parts_of(gradient, sizes):
    return [tf.constant(p) for p in np.split(gradient, np.cumsum(sizes)[:-1])]


def apply(optimizer, gradient, sizes):
    gradients = parts_of(gradient, sizes)
    variables = [keras.Variable(tf.zeros_like(g)) for g in gradients]
    optimizer.build(variables)
    return benchmark_utils.compiled(
        lambda: optimizer.apply(gradients, variables), jit_compile=False
    )


def methods_for(gradient, density, k, rng):
    size = len(gradient)
    sizes = benchmark_utils.variable_sizes(size)
    buffer = flat_buffer.FlatBuffer(
        tuple((n,) for n in sizes), (tf.float32,) * len(sizes)
    )
    parts, flat = parts_of(gradient, sizes), tf.constant(gradient)
    return {
        benchmark_utils.FLOOR: benchmark_utils.floor(gradient),
        "step, TopK": replica_step(tf_regtopk.TopK(density), gradient),
        "step, RegTopK": replica_step(tf_regtopk.RegTopK(density), gradient),
        "sum of 8": sum_of_workers(size, k, rng),
        "flatten": benchmark_utils.compiled(
            lambda: tf.concat(buffer.vectors(parts), axis=0), jit_compile=False
        ),
        "split": benchmark_utils.compiled(
            lambda: buffer.split(flat), jit_compile=False
        ),
        **{
            f"apply, {type(sparsifier).__name__}": apply(
                tf_regtopk.SparsifiedOptimizer(
                    keras.optimizers.SGD(), sparsifier
                ),
                gradient,
                sizes,
            )
            for sparsifier in (
                tf_regtopk.TopK(density),
                tf_regtopk.RegTopK(density),
            )
        },
        "apply, SGD": apply(keras.optimizers.SGD(), gradient, sizes),
    }


if __name__ == "__main__":
    benchmark_utils.run(methods_for, "The parts of a step", "results/step")
