"""Trains with a sparsifier that is not the library's, and saves the model.

A reader learns to write a `Sparsifier`: a frozen dataclass of hyper-parameters,
which scores the entries, may remember something of a step for the next one,
and is registered with Keras, so that a saved model has it.

    python examples/custom_sparsifier.py
"""

import dataclasses
import os
import tempfile

from absl import app
from absl import flags
import keras
import quickstart
import tensorflow as tf

import tf_regtopk


@keras.saving.register_keras_serializable(package="examples")
@dataclasses.dataclass(frozen=True)
class RestingTopK(tf_regtopk.Sparsifier):
    """Top-k in which an entry that was just sent has to be larger.

        score_j = rest a_j      where j was sent in the last step
        score_j = a_j           elsewhere

    Args:
        density: Float in (0, 1]. The share of entries that is sent.
        rest: Float in (0, 1].
    """

    rest: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rest <= 1:
            raise ValueError(
                f"`rest` must be in (0, 1]. Received: rest={self.rest}"
            )

    def initial_memory(self, k, size, dtype):
        del size
        # The factors are 1 because nothing was sent before the first step.
        return tf.range(k), tf.ones([k], dtype)

    def score(self, a, memory, step):
        del step
        indices, factors = memory
        return tf.tensor_scatter_nd_update(
            a, indices[:, tf.newaxis], factors * tf.gather(a, indices)
        )

    def remember(self, memory, indices, sent, total, step):
        del memory, total, step
        return indices, tf.fill(sent.shape, tf.cast(self.rest, sent.dtype))


def define_flags():
    flags.DEFINE_integer("epochs", 5, "Passes before it is saved, and after.")
    flags.DEFINE_float("density", 0.05, "Share of the entries that are sent.")
    flags.DEFINE_float("rest", 0.5, "RestingTopK's.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    images, digits = quickstart.load_digits()
    settings = dict(batch_size=64, validation_split=0.2, verbose=2)
    strategy = quickstart.make_strategy()
    with strategy.scope():
        model = quickstart.build_model(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.05, momentum=0.9),
                sparsifier=RestingTopK(args.density, args.rest),
            )
        )
    model.fit(images, digits, epochs=args.epochs, **settings)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        with strategy.scope():
            loaded = keras.models.load_model(path)
    print(f"Loaded a model that is trained with {loaded.optimizer.sparsifier}")
    loaded.fit(images, digits, epochs=args.epochs, **settings)


if __name__ == "__main__":
    define_flags()
    app.run(main)
