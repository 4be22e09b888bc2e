r"""Digits: weights averaged with neighbours, against sums of gradients.

The network, the images and the workers are those of `digits_study.py`. With a
sum all workers have the same weights; with neighbours each has weights of its
own, and both the average of these and the workers' own are tested.

    python examples/studies/decentralised_study.py --split=by_label \
        --seeds=0,1,2

`dense` is the all-reduce, and `topk` and `shift_regtopk_sign` are all-gathers
of `--density`. The others have neighbours: `ring` and `one_peer` send whole
weights, `one_peer_8_bits` rounds them, `choco` sends Top-k of 10 % around a
ring, `ring_ngc` and `ring_comp_ngc` also send gradients back, whole and as
signs, and `cliques` are groups of 4 workers, chosen by their labels, which also
average their gradients.

Source: the images ship with scikit-learn.
"""

import pathlib
import sys

from absl import app
from absl import flags
import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk import label_skew
from tf_regtopk import simulation

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import comparison
import digits_study
import methods

CLIQUE_SIZE = 4


def _decentralised(hyper, topology, **parts):
    return tf_regtopk.DecentralizedOptimizer(
        hyper.inner(hyper.momentum), topology, **parts
    )


METHODS = {
    "ring": lambda h: _decentralised(h, tf_regtopk.Ring()),
    "one_peer": lambda h: _decentralised(h, tf_regtopk.OnePeerExponential()),
    "one_peer_8_bits": lambda h: _decentralised(
        h,
        tf_regtopk.OnePeerExponential(),
        codec=tf_regtopk.Codec(values=tf_regtopk.Uniform(num_bits=8)),
        error_feedback=tf_regtopk.Accumulate(),
    ),
    "ring_ngc": lambda h: _decentralised(
        h,
        tf_regtopk.Ring(),
        cross_gradients=tf_regtopk.CrossGradients(),
    ),
    "ring_comp_ngc": lambda h: _decentralised(
        h,
        tf_regtopk.Ring(),
        cross_gradients=tf_regtopk.CrossGradients(
            codec=tf_regtopk.Codec(values="sign")
        ),
    ),
    "cliques": lambda h: _decentralised(
        h, tf_regtopk.Cliques(h.cliques, average_gradients=True)
    ),
    "choco": lambda h: _decentralised(
        h,
        tf_regtopk.Ring(),
        sparsifier=tf_regtopk.TopK(0.1),
        error_feedback=tf_regtopk.EF21(),
        consensus_step_size=0.4,
    ),
}
methods.METHODS.update(METHODS)


def define_flags():
    comparison.define_flags(
        output_dir="results/decentralised_study",
        learning_rates=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        batch_size=20,
        rounds=1500,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(comparison)
    defaults = {
        "baseline": "dense",
        "density": 0.01,
        "methods": ["dense", "topk", "shift_regtopk_sign", *METHODS],
    }
    for name, value in defaults.items():
        flags.FLAGS.set_default(name, value)
    flags.register_multi_flags_validator(
        ["rounds", "evaluate_every"],
        lambda f: f["rounds"] % f["evaluate_every"] == 0,
        "--rounds must be a multiple of --evaluate_every",
    )


def accuracies(weights, data):
    """Accuracies `[2]`: of the average, and the mean of the workers' own.

    Args:
        weights: Float tensor `[J]`, or `[N, J]`, those of each worker.
        data: As of `digits_study.data_of`.
    """
    *_, images, labels = data
    own = tf.reshape(weights, [-1, weights.shape[-1]])
    average = tf.reduce_mean(own, axis=0, keepdims=True)
    models = tf.concat([average, own], axis=0)
    predicted = tf.argmax(
        digits_study.logits(
            models,
            tf.broadcast_to(images, [models.shape[0], *images.shape]),
        ),
        axis=-1,
        output_type=tf.int32,
    )
    found = tf.reduce_mean(tf.cast(predicted == labels, tf.float32), axis=1)
    return tf.stack([found[0], tf.reduce_mean(found[1:])])


def cliques_of(labels):
    """Cliques of workers whose labels, taken together, are like those of all.

    Args:
        labels: Integer array `[rounds, N, batch]`.
    """
    histograms = [
        np.bincount(labels[:, n].ravel(), minlength=digits_study.LAYERS[-1])
        for n in range(labels.shape[1])
    ]
    return label_skew.greedy_cliques(histograms, CLIQUE_SIZE)


def train(args, trainings, is_tuning, method, learning_rate, seed):
    """One run, from weights and on batches that depend on the seed alone."""
    images, labels, *test = digits_study.data_of(args, is_tuning, seed)
    weights = digits_study.start_weights(seed)
    optimizer = methods.make_optimizer(
        method,
        args,
        learning_rate,
        args.density,
        args.momentum,
        args.inner_optimizer == "adam",
        cliques=cliques_of(labels),
    )
    descent = simulation.descent_of(optimizer, args.num_workers)
    every = args.evaluate_every
    # Compiled once for all seeds, but for cliques, which depend on the data.
    if descent not in trainings:
        trainings[descent] = simulation.gradient_descent(
            descent, digits_study.gradients_of, accuracies, args.rounds, every
        )
    data = tuple(tf.constant(part) for part in (images, labels, *test))
    rate = float(optimizer.learning_rate)
    average, own = trainings[descent](weights, rate, data).numpy().T
    return {
        "round": [*range(every, args.rounds + 1, every)],
        "accuracy": average.astype(float).tolist(),
        "own_accuracy": own.astype(float).tolist(),
        "bytes_a_step": round(digits_study.sent_bytes(descent, args)),
    }


def main(argv):
    digits_study.run_study(argv, train)


if __name__ == "__main__":
    define_flags()
    app.run(main)
