"""Selection, compiled and not, against NumPy."""

from hypothesis import strategies as st
import numpy as np
import reference
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk.kernels import device_kind

DTYPES = [np.float32, np.float64]


def select(scores, groups):
    return selection.select_largest(scores, groups)


compiled_select = tf.function(select, jit_compile=True, autograph=False)


@tf.function(jit_compile=True, autograph=False)
def select_as_on_gpu(scores, groups):
    with device_kind.compile_for("GPU"):
        return select(scores, groups)


MODES = {
    "eager": select,
    "graph": tf.function(select, autograph=False),
    "xla": compiled_select,
    "as on GPUs": select_as_on_gpu,
}


def expected(scores, groups):
    scores = np.abs(scores)
    positions, start = [], 0
    for size, k in groups:
        part = scores[start : start + size]
        positions.append(start + reference.largest(part, k))
        start += size
    return np.concatenate(positions)


def check(scores, groups, select_fn=compiled_select):
    actual = select_fn(tf.constant(scores), groups)
    assert actual.dtype == tf.int32
    np.testing.assert_array_equal(actual, expected(scores, groups))


def layered_scores(rng, size):
    """Runs of very different scale, as the layers of a network."""
    scale = np.exp(2 * rng.standard_normal(size // 1000 + 1)).repeat(1000)
    return np.abs(rng.standard_normal(size) * scale[:size]).astype(np.float32)


LARGE_SCORES = {
    "normal": lambda rng, size: np.abs(rng.standard_normal(size)),
    "layers": layered_scores,
    "ties": lambda rng, size: rng.integers(0, 3, size),
    "few_ties": lambda rng, size: np.floor(5 * rng.standard_exponential(size)),
    "zeros": lambda rng, size: np.zeros(size),
    "constant": lambda rng, size: np.full(size, 1e37),
    "spike": lambda rng, size: np.where(np.arange(size) == 98765, 2.0, 0.0),
    "rising": lambda rng, size: np.arange(size),
    "every_96th": lambda rng, size: (
        (np.arange(size) % 96 == 0) + rng.random(size)
    ),
    "infinite": lambda rng, size: np.where(
        rng.random(size) < 0.01, np.inf, 1.0
    ),
}


def draw_large_scores(data, size, dtype=np.float32):
    name = data.draw(st.sampled_from(sorted(LARGE_SCORES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = LARGE_SCORES[name](rng, size) * rng.choice([-1.0, 1.0], size)
    scores[rng.integers(size, size=data.draw(st.integers(0, 3)))] = 1e37
    return scores.astype(dtype)
