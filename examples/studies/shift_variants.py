"""Variations on `tf_regtopk.LearnedShift`, to learn what matters in it."""

import dataclasses

import keras
import tensorflow as tf

import tf_regtopk


@keras.saving.register_keras_serializable(package="examples")
@dataclasses.dataclass(frozen=True)
class RoundedShift(tf_regtopk.LearnedShift):
    """Each worker keeps its h in bfloat16, rounded at random.

    The sum H of all h, which every worker computes from what was sent, knows
    nothing of that rounding.
    """

    def update(self, local, indices, sent, total, context):
        e, h, *u = super().update(local, indices, sent, total, context)
        bits = tf.bitcast(tf.cast(h, tf.float32), tf.uint32)
        noise = tf.random.stateless_uniform(
            h.shape,
            [tf.cast(context.number, tf.int32), 0],
            0,
            1 << 16,
            tf.int32,
        )
        bits = (bits + tf.bitcast(noise, tf.uint32)) & 0xFFFF0000
        return (e, tf.cast(tf.bitcast(bits, tf.float32), h.dtype), *u)


# `adam_without_mean` is Adam after the sum as in "shift_regtopk", but its mean
# of gradients, which would run on where entries wait anyway, is left out.
#
# As those of `methods.py`. At density 1 they take other steps than these: the
# first has no momentum then, and the second rounds.
METHODS = {
    "shift_masked": lambda h: h.sparsified(
        h.regtopk(),
        tf_regtopk.LearnedShift(
            momentum=h.momentum, factor_masking=h.momentum > 0
        ),
    ),
    "shift_rounded": lambda h: h.sparsified(
        h.regtopk(), RoundedShift(momentum=h.momentum)
    ),
    "adam_without_mean": lambda h: tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.Adam(h.learning_rate, beta_1=0.0),
        h.regtopk(),
        codec=h.codec,
        error_feedback=tf_regtopk.LearnedShift(),
    ),
}
