r"""Decodes random and damaged payloads, a million by default.

Whatever is decoded, indices must lie in the gradient, and what is called valid
must hold k different ones. `test_payload.py` tries a few hundred.

    python tests/soak/fuzz_payloads.py --payloads=1000000
"""

from absl import app
from absl import flags
import numpy as np
import tensorflow as tf
import tqdm

import tf_regtopk

# Compiled once for each of them: J, k.
_SHAPES = [(40, 3), (1000, 10), (257, 128), (5000, 2)]
_CODECS = [
    ("int32", "float32"),
    ("elias_fano", "natural"),
    ("golomb", "ternary"),
    ("bitmap", "uniform"),
]
_BATCH = 500


def define_flags():
    flags.DEFINE_integer(
        "payloads", 1_000_000, "How many to decode.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the payloads.", lower_bound=0)


def damaged(payload, rng):
    """A batch of payloads: random words, or a valid one with some changed."""
    words = rng.integers(
        0, 2**32, (_BATCH, len(payload)), dtype=np.uint64
    ).astype(np.uint32)
    for row in words[: _BATCH // 2]:
        noise = row.copy()
        row[:] = payload.view(np.uint32)
        kind = rng.integers(4)
        at = rng.integers(len(payload))
        if kind == 0:  # Some bits flipped; at times none.
            for _ in range(rng.integers(4)):
                row[rng.integers(len(row))] ^= np.uint32(1 << rng.integers(32))
        elif kind == 1:
            row[at:] = 0
        elif kind == 2:
            row[at:] = noise[at:]
        else:
            row[at:] = row[: len(row) - at]
    return words.view(np.int32)


def check(codec, decode, payloads):
    """Raises unless all is as it must be; returns the number of valid ones."""
    indices, _, is_valid = (t.numpy() for t in decode(tf.constant(payloads)))
    assert (indices >= 0).all() and (indices < codec.indices.size).all()
    assert (np.diff(indices[is_valid], axis=1) > 0).all()
    return is_valid.sum()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    rng = np.random.default_rng(flags.FLAGS.seed)
    cases = []
    for size, k in _SHAPES:
        for names in _CODECS:
            codec = tf_regtopk.Codec(*names).payload(k, size)
            decode = tf.function(
                codec.decode, jit_compile=True, autograph=False
            )
            cases.append((codec, decode))
    done, num_valid = 0, 0
    with tqdm.tqdm(total=flags.FLAGS.payloads) as bar:
        while done < flags.FLAGS.payloads:
            codec, decode = cases[done // _BATCH % len(cases)]
            k, size = codec.indices.k, codec.indices.size
            payload, _ = codec.encode(
                tf.constant(np.sort(rng.permutation(size)[:k]), tf.int32),
                tf.constant(rng.standard_normal(k), tf.float32),
                (done, 0),
            )
            num_valid += check(codec, decode, damaged(payload.numpy(), rng))
            done += _BATCH
            bar.update(_BATCH)
    print(
        f"{done} payloads decoded, {num_valid} of them valid; all as it must."
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
