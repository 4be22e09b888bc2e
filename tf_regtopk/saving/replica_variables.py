"""The variables of replicas that have values of their own.

Keras saves those of the first replica. What this module saves goes into a
`saved_state.SavedState`, so that the files of all workers are read together.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk.distribute import replica_state
from tf_regtopk.saving import saved_state


def read(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> list[list[np.ndarray]]:
    """Returns the values of variables on each replica of this process.

    Args:
        variables: List of variables, created in the scope of the strategy. Not
            empty.
        strategy: `tf.distribute.Strategy`.

    Returns:
        For each replica the list of its arrays, of dtypes that every file can
        hold: of bfloat16 the bits, as integers.
    """
    parts = [replica_state.parts(v, strategy) for v in variables]
    return [
        [_storable(part.numpy()) for part in of_replica]
        for of_replica in zip(*parts, strict=True)
    ]


def assign(
    variables: Sequence[keras.Variable],
    strategy: tf.distribute.Strategy,
    values: Sequence[Sequence[np.ndarray]],
) -> None:
    """Inverts `read`.

    Args:
        variables: As of `read`.
        strategy: As of `read`.
        values: What `read` returns.
    """
    for variable, of_replicas in zip(
        variables, zip(*values, strict=True), strict=True
    ):
        for part, array in zip(
            replica_state.parts(variable, strategy), of_replicas, strict=True
        ):
            part.assign(_release(array, _dtype(variable)))


def values_for(
    saved: saved_state.SavedState,
    replicas: Sequence[int],
    num_replicas: int,
    variables: Sequence[keras.Variable],
) -> list[list[np.ndarray]]:
    """Returns the values with which the replicas of a process resume.

    Each replica gets its own where their number is unchanged. Of another number
    all replicas get the mean of the variables of floats, and what the first
    replica had of the others.

    Args:
        saved: `SavedState` of all replicas that are needed, whose arrays begin
            with those of `read`.
        replicas: Ranks of the replicas to load.
        num_replicas: Number of replicas in the run that loads.
        variables: List of the variables that are to get them.

    Returns:
        What `assign` takes.

    Raises:
        ValueError: If replicas are missing, or their arrays do not fit.

    Example:

    >>> saved = saved_state.SavedState(
    ...     {}, {}, 2, {0: [np.float32([1, 2])], 1: [np.float32([3, 6])]})
    >>> variable = keras.Variable(np.zeros(2), dtype="float32")
    >>> values_for(saved, [1], 2, [variable])
    [[array([3., 6.], dtype=float32)]]
    >>> values_for(saved, [0], 1, [variable])
    [[array([2., 4.], dtype=float32)]]
    """
    is_same = saved.num_replicas == num_replicas
    needed = replicas if is_same else range(saved.num_replicas)
    missing = sorted(set(needed) - set(saved.replicas))
    if missing:
        raise ValueError(
            "What each replica kept must be there of all replicas that are "
            "needed: load it in `tf_regtopk.load_scope(path, strategy)`. "
            f"Received: none of the replicas {missing}"
        )
    found = {n: saved.replicas[n][: len(variables)] for n in needed}
    for arrays in found.values():
        _check_fit(arrays, variables)
    if is_same:
        return [found[n] for n in replicas]
    common = [
        _mean(of_replicas, _dtype(variable))
        for variable, of_replicas in zip(
            variables, zip(*found.values(), strict=True), strict=True
        )
    ]
    return [common for _ in replicas]


def describe(variables: Sequence[keras.Variable]) -> list[list[object]]:
    """Returns the shapes and dtypes of variables, as JSON can hold them."""
    return [[list(v.shape), _dtype(v).name] for v in variables]


def _check_fit(
    arrays: Sequence[np.ndarray], variables: Sequence[keras.Variable]
) -> None:
    expected = [
        (tuple(v.shape), _storable(np.empty(0, _dtype(v))).dtype)
        for v in variables
    ]
    received = [(array.shape, array.dtype) for array in arrays]
    if received != expected:
        raise ValueError(
            "What each replica kept must be of the shapes and dtypes "
            f"{expected}. Received: {received}"
        )


def _dtype(variable: keras.Variable) -> np.dtype:
    dtype: np.dtype = tf.as_dtype(variable.dtype).as_numpy_dtype
    return np.dtype(dtype)


def _mean(values: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The mean of storable floats; the first one of others."""
    if not tf.as_dtype(dtype).is_floating:
        return values[0]
    wide = [_release(array, dtype).astype(np.float64) for array in values]
    return _storable(np.mean(wide, axis=0).astype(dtype))


def _storable(array: np.ndarray) -> np.ndarray:
    """An array whose dtype NumPy and HDF5 know by name, of the same bits."""
    if array.dtype.isbuiltin == 1:
        return array
    return array.view(f"u{array.dtype.itemsize}")


def _release(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Inverts `_storable`."""
    return array if array.dtype == dtype else array.view(dtype)
