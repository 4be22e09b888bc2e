"""The state with which replicas resume, also another number of them.

The residual error is gradient that has not been applied yet (and so is the
state of other rules of error feedback). So if the number of replicas is
unchanged each resumes with exactly its own state, and any other number N' of
replicas gets the same total:

    e_n = (sum over the N saved replicas m of e_m) / N'     for n = 1 .. N'

The same holds for the gradients of batches that have not been exchanged yet.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import warnings

import numpy as np

from tf_regtopk.saving.saved_state import SavedState


def check_replicas(saved: SavedState) -> None:
    """Raises unless the numbers of the replicas make sense."""
    count = saved.num_replicas
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            "The saved number of replicas must be an integer >= 1. "
            f"Received: num_replicas={count!r}"
        )
    if not set(saved.replicas) <= set(range(count)):
        raise ValueError(
            f"The saved replicas must be of those from 0 to {count - 1}. "
            f"Received: {sorted(saved.replicas)}"
        )


def check_state(
    replicas: Sequence[Sequence[np.ndarray]],
    initial: Sequence[np.ndarray],
    num_errors: int,
) -> None:
    """Raises unless the replicas of a process can resume with some arrays.

    Args:
        replicas: For each replica its list of arrays.
        initial: Arrays of the right shapes and dtypes.
        num_errors: How many of these are errors, which are finite; the others
            are the memory of the sparsifier.
    """

    def describe(arrays: Sequence[np.ndarray]) -> list[str]:
        return [f"{array.dtype}{list(array.shape)}" for array in arrays]

    for parts in replicas:
        parts = [np.asarray(part) for part in parts]
        if describe(parts) != describe(initial):
            raise ValueError(
                f"The saved arrays of a replica must be {describe(initial)}. "
                f"Received: {describe(parts)}"
            )
        for part, first in zip(
            parts[:num_errors], initial[:num_errors], strict=True
        ):
            if not np.all(np.isfinite(part) | ~np.isfinite(first)):
                raise ValueError(
                    "The saved residual errors must be finite. Received: "
                    f"{np.sum(~np.isfinite(part))} entries that are NaN or "
                    "infinite"
                )


def combine(saved: SavedState, others: Iterable[SavedState]) -> SavedState:
    """Adds the replicas that other workers saved at the same moment to `saved`.

    Args:
        saved: `SavedState`.
        others: List of `SavedState`, of any moments and optimizers.

    Returns:
        `SavedState` of all replicas.

    Raises:
        ValueError: If no `SavedState` has some of the replicas.
    """
    replicas = dict(saved.replicas)
    accumulated = dict(saved.accumulated)
    for other in others:
        if other[:3] == saved[:3]:
            replicas.update(other.replicas)
            accumulated.update(other.accumulated)
    missing = sorted(set(range(saved.num_replicas)) - set(replicas))
    if missing:
        raise ValueError(
            f"The workers' files must hold all {saved.num_replicas} replicas "
            f"of the run as they were at step {saved.moment['step']}. "
            f"Received: none with the replicas {missing}"
        )
    return saved._replace(replicas=replicas, accumulated=accumulated)


def needs_others(
    saved: SavedState, replicas: Sequence[int], num_replicas: int
) -> bool:
    """Returns whether `state_of_replicas` needs replicas of other workers."""
    if num_replicas == saved.num_replicas:
        return not set(replicas) <= set(saved.replicas)
    return len(saved.replicas) < saved.num_replicas


def state_of_replicas(
    saved: SavedState,
    replicas: Sequence[int],
    num_replicas: int,
    local: Sequence[np.ndarray],
    shared: Sequence[np.ndarray] = (),
    memory: Sequence[np.ndarray] = (),
) -> list[list[np.ndarray]]:
    """Returns the state with which the replicas of a process resume.

    Args:
        saved: `SavedState`.
        replicas: Ranks of the replicas to load.
        num_replicas: Number of replicas in the run that loads.
        local: Initial arrays whose sums over the replicas are kept.
        shared: Initial arrays that are the same on all replicas.
        memory: Initial arrays of the sparsifier's memory, which is valid only
            if the number of replicas is unchanged.

    Returns:
        List of lists of arrays, one for each of `replicas`.

    Example:

    >>> saved = SavedState({}, {}, 1, {0: [np.array([1.0, 2.0])]})
    >>> state_of_replicas(saved, [0], num_replicas=1, local=[np.zeros(2)])
    [[array([1., 2.])]]
    """
    own, common = _separate(saved, len(local), len(shared))
    missing = sorted(set(range(saved.num_replicas)) - set(saved.replicas))
    if needs_others(saved, replicas, num_replicas):
        if shared:
            raise ValueError(
                "With this rule of error feedback the state of all workers is "
                "needed: load it in `tf_regtopk.load_scope(path, strategy)`. "
                f"Received: none of the replicas {missing}"
            )
        warnings.warn(
            f"The residual errors of the replicas {missing} are not in this "
            "file of one worker, and count as 0. To go on training with what "
            "all workers have saved, load it in "
            "`tf_regtopk.load_scope(path, strategy)`.",
            stacklevel=2,
        )
    if num_replicas == saved.num_replicas:
        found = [own.get(n, [*local, *memory]) for n in replicas]
        return [
            [*parts[: len(local)], *common, *parts[len(local) :]]
            for parts in found
        ]
    parts = list(zip(*own.values(), strict=True))

    def share(values: Sequence[np.ndarray]) -> np.ndarray:
        total = np.sum(values, axis=0, dtype=np.float64)
        return (total / num_replicas).astype(values[0].dtype)

    state = [share(values) for values in parts[: len(local)]]
    if not missing:
        warnings.warn(
            f"Saved by {saved.num_replicas} replicas, loaded by "
            f"{num_replicas}: the total of the residual errors is kept and "
            "spread evenly; what the sparsifier remembers of the last step is "
            "dropped.",
            stacklevel=2,
        )
    return [[*state, *common, *memory] for _ in replicas]


def accumulated_of_replicas(
    saved: SavedState,
    replicas: Sequence[int],
    num_replicas: int,
    initial: Sequence[Sequence[np.ndarray]],
) -> list[Sequence[Sequence[np.ndarray]]]:
    """Returns the accumulated gradients with which a process's replicas resume.

    Args:
        saved: `SavedState`.
        replicas: Ranks of the replicas to load.
        num_replicas: Number of replicas in the run that loads.
        initial: For each device that shares a replica's state, the list of its
            initial arrays: zeros.

    Returns:
        List like `initial` for each of `replicas`.

    Raises:
        ValueError: If the arrays are of other shapes or dtypes.

    Example:

    >>> saved = SavedState(
    ...     {}, {}, 1, {}, accumulated={0: [[np.array([1.0, 2.0])]]})
    >>> accumulated_of_replicas(
    ...     saved, [1], num_replicas=2, initial=[[np.zeros(2)]])
    [[[array([0.5, 1. ])]]]
    """
    expected = _shapes(initial[0])
    for parts in itertools.chain(*saved.accumulated.values()):
        if _shapes(parts) != expected:
            raise ValueError(
                "The saved accumulated gradients must be of the shapes and "
                f"dtypes {expected}. Received: {_shapes(parts)}"
            )

    def spread(
        of_devices: Sequence[Sequence[np.ndarray]], num_devices: int
    ) -> Sequence[Sequence[np.ndarray]]:
        if not of_devices:
            return initial
        share = [
            (np.sum(values, axis=0, dtype=np.float64) / num_devices).astype(
                values[0].dtype
            )
            for values in zip(*of_devices, strict=True)
        ]
        return [share] * len(initial)

    if num_replicas != saved.num_replicas:
        of_devices = [*itertools.chain(*saved.accumulated.values())]
        return [spread(of_devices, num_replicas * len(initial))] * len(replicas)
    found = [saved.accumulated.get(n, ()) for n in replicas]
    return [
        parts if len(parts) == len(initial) else spread(parts, len(initial))
        for parts in found
    ]


def _shapes(arrays: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], str]]:
    return [(array.shape, array.dtype.name) for array in arrays]


def _separate(
    saved: SavedState, num_local: int, num_shared: int
) -> tuple[dict[int, list[np.ndarray]], Sequence[np.ndarray]]:
    """Returns the replicas' own arrays, and those that all of them share."""
    if saved.shared is not None:
        return saved.replicas, saved.shared
    end = num_local + num_shared
    own = {
        n: [*parts[:num_local], *parts[end:]]
        for n, parts in saved.replicas.items()
    }
    of_first = next(iter(saved.replicas.values()), [])
    return own, of_first[num_local:end]
