"""An optimizer with a codec, for small variables."""

import keras
import numpy as np

import tf_regtopk

SHAPES = [(3, 5), (7,), (12, 7)]


SIZES = [int(np.prod(shape)) for shape in SHAPES]


SIZE = sum(SIZES)


def make(strategy, dense_below=0, **kwargs):
    with strategy.scope():
        variables = [
            keras.Variable(np.zeros(shape), dtype="float32") for shape in SHAPES
        ]
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(1.0), dense_below=dense_below, **kwargs
        )
        optimizer.build(variables)
    return optimizer, variables


CODECS = {
    "raw": tf_regtopk.Codec("int32", "float32"),
    "default": None,
    "golomb, ternary": tf_regtopk.Codec("golomb", "ternary"),
    "golomb, natural": tf_regtopk.Codec("golomb", "natural"),
    "bitmap, bfloat16": tf_regtopk.Codec("bitmap", "bfloat16"),
    "uniform": tf_regtopk.Codec(
        "elias_fano", tf_regtopk.Uniform(num_bits=2, bucket_size=5, seed=3)
    ),
}
