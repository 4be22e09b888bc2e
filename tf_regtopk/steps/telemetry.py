r"""Telemetry: a few numbers about a step, computed only where asked for.

Of replica n, its gradient g, the accumulated gradient a, the selected entries s
and what the others receive of them, `sent`:

    gradient       |g|                      norms, and of each variable
    accumulated    |a|
    sent           |sent|
    residual       |a - sent|               what is held back
    selected       k                        and of each variable
    unlike_top_k   how many of s Top-k would not have selected
    cancelled      1 - |sum of all sent|_1 / sum of |sent|_1, in [0, 1]
    sample_failed  1 if selection had to look at all scores, else 0
    exchange_seconds  from the payload of this replica to those of all, as the
                   host sees it: sending, waiting for the others, and by a
                   reduce-scatter the sums of this owner; 0 with one participant
    age            steps since an entry was last sent: the mean, of each
                   variable, and the largest, `oldest`

and what the sparsifier measures (`Sparsifier.measure`). With a `ReduceScatter`
`sent`, `residual` and `age` are about what was selected, of which the owners
keep a part. Ages need an array of J numbers, and are measured only with
`telemetry="ages"`.
"""

from collections.abc import Sequence
import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk.steps import round as round_lib


def initial(
    sizes: Sequence[int], sparsifier: sparsifiers.Sparsifier, has_ages: bool
) -> tuple[tf.Tensor, ...]:
    """Returns the numbers before the first step, which are zeros.

    Args:
        sizes: Number of entries of each variable.
        sparsifier: `Sparsifier`.
        has_ages: Whether ages are measured.

    Returns:
        Tuple of a float tensor `[5, number of variables]`, the norms of g, a,
        sent and a - sent and the numbers of selected entries; of a float
        tensor `[J]`, the ages, or `[0]`; and of float scalars:
        `_SCALARS`, and those of the sparsifier.
    """
    num_scalars = len(_SCALARS) + len(sparsifier.measured)
    return (
        tf.zeros([5, len(sizes)]),
        tf.zeros([sum(sizes) if has_ages else 0]),
        *(tf.zeros([]),) * num_scalars,
    )


def of_send(
    method: round_lib.Method,
    sizes: Sequence[int],
    gradient: tf.Tensor,
    a: tf.Tensor,
    state: round_lib.State,
    sent: round_lib.Sent,
    step: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Measures the first half of a step.

    Args:
        method: `round.Method`.
        sizes: Number of entries of each variable.
        gradient: Float tensor `[J]`.
        a: Float tensor `[J]`, the accumulated gradient.
        state: `round.State` before the step.
        sent: `round.Sent`.
        step: Scalar integer tensor, the number of steps taken before.

    Returns:
        Tuple as of `initial`, in which `cancelled` is 0.
    """
    indices, values = sent.indices, sent.values
    a_sent = selection.take(a, indices)
    # The place of the variable of each selected entry.
    ends = tf.constant([*itertools.accumulate(sizes)], tf.int32)
    variable = tf.searchsorted(ends, indices, side="right")

    def by_variable(entries: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(entries, variable, len(sizes))

    # In float64, because a float32 has no squares of 2e19 and more, and because
    # millions of them are added one by one, and then subtracted.
    def squared(entries: tf.Tensor) -> tf.Tensor:
        return tf.square(tf.cast(entries, tf.float64))

    def squares(vector: tf.Tensor) -> tf.Tensor:
        parts = tf.split(vector, sizes)
        return tf.stack([tf.reduce_sum(squared(part)) for part in parts])

    squares_of_a = squares(a)
    held_back = squares_of_a - by_variable(squared(a_sent))
    residual = held_back + by_variable(squared(a_sent - values))
    norms = tf.sqrt(
        [
            squares(gradient),
            squares_of_a,
            by_variable(squared(values)),
            # Rounding may leave less than nothing.
            tf.maximum(residual, 0),
        ]
    )
    counts = by_variable(tf.ones_like(indices))
    vectors = tf.concat(
        [tf.cast(norms, tf.float32), [tf.cast(counts, tf.float32)]], axis=0
    )
    top_k = selection.select_largest(a, method.groups, step)
    mask = tf.scatter_nd(
        top_k[:, tf.newaxis], tf.ones_like(top_k), [sum(sizes)]
    )
    num_shared = tf.reduce_sum(tf.gather(mask, indices))
    scores = method.sparsifier.score(a, state.memory, step)
    scalars = [
        indices.shape[0] - num_shared,
        tf.zeros([]),
        ~selection.sample_suffices(scores, method.groups, step),
        tf.zeros([]),
        *method.sparsifier.measure(a, state.memory, indices),
    ]
    ages = state.measured[1]
    if ages.shape[0]:
        ages = tf.tensor_scatter_nd_update(
            ages + 1, indices[:, tf.newaxis], tf.zeros_like(indices, ages.dtype)
        )
    return vectors, ages, *(tf.cast(s, tf.float32) for s in scalars)


def of_settle(
    measured: tuple[tf.Tensor, ...], sent: tf.Tensor, total: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Adds to the numbers what was cancelled among the replicas.

    Args:
        measured: Tuple, from `of_send`.
        sent: Float scalar, the sum of the magnitudes of all entries of all
            replicas that are in the total.
        total: Float tensor `[J]`, the sum of the entries.
    """
    left = tf.reduce_sum(tf.abs(total))
    # Rounding may leave more than was sent.
    cancelled = tf.maximum(1 - tf.math.divide_no_nan(left, sent), 0)
    cancelled = tf.where(sent > 0, cancelled, tf.zeros_like(cancelled))
    return _with_scalar(measured, "cancelled", cancelled)


def of_exchange(
    measured: tuple[tf.Tensor, ...], seconds: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Adds to the numbers the seconds of the exchange.

    Args:
        measured: Tuple, from `of_send`.
        seconds: Float scalar.
    """
    return _with_scalar(measured, "exchange_seconds", seconds)


def _with_scalar(
    measured: tuple[tf.Tensor, ...], name: str, value: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    place = 2 + _SCALARS.index(name)
    value = tf.cast(value, tf.float32)
    return (*measured[:place], value, *measured[place + 1 :])


def by_name(
    arrays: Sequence[np.ndarray],
    sizes: Sequence[int],
    order: Sequence[int],
    sparsifier: sparsifiers.Sparsifier,
) -> dict[str, Any]:
    """Returns the numbers of one replica by their names.

    Args:
        arrays: NumPy arrays as of `initial`.
        sizes: Number of entries of each variable.
        order: For each variable of the result its place in the flat buffer.
        sparsifier: `Sparsifier`.

    Returns:
        Dict of floats, and, by the names that end in `_by_variable`, of arrays
        `[number of variables]`.
    """
    vectors, ages, *scalars = arrays
    found: dict[str, Any] = {}
    for name, of_variables in zip(_NORMS, vectors, strict=False):
        found[name] = float(np.linalg.norm(of_variables.astype(np.float64)))
        found[f"{name}_by_variable"] = of_variables
    found["selected"] = float(vectors[-1].sum())
    found["selected_by_variable"] = vectors[-1]
    if ages.size:
        found["age"] = float(ages.mean())
        found["age_by_variable"] = np.array(
            [part.mean() for part in np.split(ages, np.cumsum(sizes)[:-1])]
        )
        found["oldest"] = float(ages.max())
    for name, value in found.items():
        if name.endswith("_by_variable"):
            found[name] = value[np.asarray(order)]
    names = (*_SCALARS, *sparsifier.measured)
    return found | dict(zip(names, map(float, scalars), strict=True))


_NORMS = ("gradient", "accumulated", "sent", "residual")
_SCALARS = ("unlike_top_k", "cancelled", "sample_failed", "exchange_seconds")
