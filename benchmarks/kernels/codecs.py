r"""How long entries take to be written and read, and how many bits they take.

Each code of the indices alone, each code of the values alone, and whole
payloads: one replica's encoding, and the decoding of one replica's payload.

    python -m benchmarks.kernels.codecs --sizes=11200000
"""

import numpy as np
import tensorflow as tf

from benchmarks import harness
import tf_regtopk
from tf_regtopk.codecs import index_codecs
from tf_regtopk.codecs import value_codecs

_PAYLOADS = {
    "raw": ("int32", "float32"),
    "elias_fano + float32": ("elias_fano", "float32"),
    "elias_fano + natural": ("elias_fano", "natural"),
    "golomb + ternary": ("golomb", "ternary"),
}


def methods_for(gradient, density, k, rng):
    """Name to function, and name to bits an entry."""
    size = len(gradient)
    indices = np.sort(rng.choice(size, k, replace=False, shuffle=False))
    values = tf.constant(gradient[indices])
    indices = tf.constant(indices, tf.int32)
    methods = {harness.FLOOR: harness.floor(gradient)}
    num_bits = {}

    def add(name, encode, decode, num_words):
        encode = harness.compiled(encode)
        words = encode()
        methods[f"{name}, encode"] = encode
        methods[f"{name}, decode"] = harness.compiled(lambda: decode(words))
        num_bits[name] = 32 * int(num_words(words)) / k

    for name in index_codecs.CODECS:
        codec = index_codecs.choose(name, k, size)
        add(
            name,
            lambda codec=codec: codec.encode(indices),
            codec.decode,
            codec.num_used,
        )
    for name, codec in value_codecs.CODECS.items():
        add(
            name,
            lambda codec=codec: codec.encode(values, (0, 0)),
            lambda words, codec=codec: codec.decode(words, k, tf.float32),
            len,
        )
    for name, arguments in _PAYLOADS.items():
        codec = tf_regtopk.Codec(*arguments).payload(k, size)
        add(
            name,
            lambda codec=codec: codec.encode(indices, values, (0, 0))[0],
            lambda payload, codec=codec: codec.decode(payload[tf.newaxis]),
            codec.num_used,
        )
    bound = index_codecs.entropy_bits(k, size) / k
    print(f"\nJ = {size}, density {density:g}: bits an entry")
    print(f"{'bound of the indices':28} {bound:6.2f}")
    for name, number in num_bits.items():
        print(f"{name:28} {number:6.2f}")
    return methods


if __name__ == "__main__":
    harness.run(methods_for, "Writing and reading entries", "results/codecs")
