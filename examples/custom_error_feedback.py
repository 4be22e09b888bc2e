"""Trains with a rule of error feedback that is not the library's.

A reader learns to write an `ErrorFeedback`: what each replica keeps between
steps, what entries are selected from, and what becomes of the rest once it is
known what was sent.

    python examples/custom_error_feedback.py --decay=0.5
"""

import dataclasses

from absl import app
from absl import flags
import keras
import quickstart
import tensorflow as tf

import tf_regtopk


@keras.saving.register_keras_serializable(package="examples")
@dataclasses.dataclass(frozen=True)
class ForgetfulAccumulate(tf_regtopk.ErrorFeedback):
    """Error accumulation that forgets what has waited for long.

        a = decay e + g,        e = a - sent

    Args:
        decay: Float in [0, 1]. With 1 it is `Accumulate()`, with 0
            `NoFeedback()`.
    """

    decay: float = 0.9

    num_local = 1  # The residual error e, zeros at first.

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise ValueError(
                f"`decay` must be in [0, 1]. Received: decay={self.decay}"
            )

    def accumulate(self, local, shared, gradient, context):
        del shared, context
        [e] = local
        a = self.decay * e + gradient
        return a, (a,)  # It keeps a until it is known what was sent.

    def update(self, local, indices, sent, total, context):
        del total, context
        [a] = local
        # A codec may have rounded what was sent, and the error keeps that too.
        e = tf.tensor_scatter_nd_sub(a, indices[:, tf.newaxis], sent)
        return (e,)


def define_flags():
    flags.DEFINE_integer("epochs", 10, "Passes over the images.", lower_bound=1)
    flags.DEFINE_float("density", 0.05, "Share of the entries that are sent.")
    flags.DEFINE_float("decay", 0.9, "ForgetfulAccumulate's.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    images, digits = quickstart.load_digits()
    with quickstart.make_strategy().scope():
        model = quickstart.build_model(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.05, momentum=0.9),
                sparsifier=tf_regtopk.TopK(args.density),
                codec=tf_regtopk.Codec(values="natural"),
                error_feedback=ForgetfulAccumulate(args.decay),
            )
        )
    model.fit(
        images,
        digits,
        batch_size=64,
        epochs=args.epochs,
        validation_split=0.2,
        verbose=2,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
