"""The saved state of the replicas, and its way back.

The residual error is gradient that has not been applied yet (and so is the
state of other rules of error feedback). So if the number of replicas is
unchanged each resumes with exactly its own state, and any other number N' of
replicas gets the same total:

    e_n = (sum over the N saved replicas m of e_m) / N'     for n = 1 .. N'

The same holds for the gradients of batches that have not been exchanged yet.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import io
import itertools
import json
import re
from typing import Any
from typing import NamedTuple
import warnings
import zlib

import numpy as np
import numpy.typing as npt

from tf_regtopk import version

_DESCRIPTION = "replica_state"
# What a layout calls the variables that are exchanged densely.
DENSE_VARIABLES = "dense_variables"
# Format 1 has no number, because version 0.1.0 wrote none. Format 2 names the
# package of a class as well (`saved_config.py`), and has what is shared once.
_FORMAT = 2


class NewerFormatError(ValueError):
    """A file of a later version of this package."""


class SavedState(NamedTuple):
    """The state of some or all replicas of a run.

    Args:
        layout: JSON-like dict; state fits only if the layout is the same.
        moment: JSON-like dict of the time of saving, the same for all workers
            that saved in the same step.
        num_replicas: Number of replicas in the whole run.
        replicas: Dict from a replica's rank to its list of arrays: its own
            state of the rule of error feedback, then the memory of the
            sparsifier.
        shared: List of arrays, the state that is the same on all replicas.
            None in a file of format 1, where each replica has it between its
            own state and the memory.
        accumulated: Dict from a replica's rank to a list, for each device that
            shares the replica's state, of lists of arrays: the sums of the
            gradients of an accumulation that has not been exchanged. Empty
            between accumulations.
    """

    layout: dict[str, Any]
    moment: dict[str, Any]
    num_replicas: int
    replicas: dict[int, list[np.ndarray]]
    shared: Sequence[np.ndarray] | None = ()
    accumulated: Mapping[int, Sequence[Sequence[np.ndarray]]] = {}


def to_arrays(
    saved: SavedState, variables: Iterable[npt.ArrayLike] = ()
) -> dict[str, np.ndarray]:
    """Converts a `SavedState` to a dict from names to NumPy arrays.

    Args:
        saved: `SavedState`.
        variables: Arrays to store beside it, by the names "0", "1", ...

    Returns:
        Dict of arrays, with a checksum of each array.
    """
    arrays = {str(i): np.asarray(array) for i, array in enumerate(variables)}
    for n, parts in saved.replicas.items():
        for i, part in enumerate(parts):
            arrays[_name(n, i)] = np.asarray(part)
    for i, part in enumerate(saved.shared or ()):
        arrays[_shared_name(i)] = np.asarray(part)
    for n, devices in saved.accumulated.items():
        for device, sums in enumerate(devices):
            for i, part in enumerate(sums):
                arrays[_accumulated_name(n, device, i)] = np.asarray(part)
    description = {
        "format": 1 if saved.shared is None else _FORMAT,
        "library": version.__version__,
        "layout": saved.layout,
        "moment": saved.moment,
        "num_replicas": saved.num_replicas,
        "replicas": {str(n): len(parts) for n, parts in saved.replicas.items()},
        "shared": len(saved.shared or ()),
        "checksums": {name: checksum([a]) for name, a in arrays.items()},
    }
    if saved.accumulated:
        description["accumulated"] = {
            str(n): [len(parts) for parts in devices]
            for n, devices in saved.accumulated.items()
        }
    text = np.frombuffer(json.dumps(description).encode(), np.uint8)
    own_checksum = np.array([checksum([text])], "<u4").view(np.uint8)
    return {_DESCRIPTION: np.concatenate([own_checksum, text]), **arrays}


def from_arrays(
    arrays: Mapping[str, np.ndarray],
) -> tuple[SavedState, list[np.ndarray]]:
    """Inverts `to_arrays`.

    Args:
        arrays: Mapping from names to arrays.

    Returns:
        `(saved, variables)`: `SavedState` and list of arrays.

    Raises:
        ValueError: If anything is missing or damaged.
    """
    if _DESCRIPTION not in arrays:
        raise ValueError(
            "The state must have been saved by a `SparsifiedOptimizer`. "
            f"Received: arrays of the names {sorted(arrays)[:5]}. What another "
            "optimizer has saved is for a model compiled with that optimizer: "
            "load it there, and then call `tf_regtopk.wrap(model)`; or load "
            "the weights alone before `compile`"
        )
    try:
        own_checksum, text = np.split(
            np.asarray(arrays[_DESCRIPTION], np.uint8), [4]
        )
        if own_checksum.view("<u4").tolist() != [checksum([text])]:
            raise ValueError("a description with another checksum")
        description = json.loads(text.tobytes())
        _check_format(description)
        checksums = description["checksums"]
        damaged = [
            name
            for name in checksums
            if checksum([arrays[name]]) != checksums[name]
        ]
        saved = SavedState(
            description["layout"],
            description["moment"],
            description["num_replicas"],
            {
                int(n): [
                    np.asarray(arrays[_name(n, i)]) for i in range(num_parts)
                ]
                for n, num_parts in description["replicas"].items()
            },
            _read_shared(arrays, description),
            {
                int(n): [
                    [
                        np.asarray(arrays[_accumulated_name(n, device, i)])
                        for i in range(num_parts)
                    ]
                    for device, num_parts in enumerate(devices)
                ]
                for n, devices in description.get("accumulated", {}).items()
            },
        )
    except NewerFormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            "The saved state of the optimizer must be complete. Received: "
            f"{type(e).__name__}: {e}"
        ) from e
    if damaged:
        raise ValueError(
            "The saved state of the optimizer must be as it was written. "
            f"Received: {damaged} with another checksum"
        )
    num_variables = sum(name.isdigit() for name in checksums)
    return saved, [arrays[str(i)] for i in range(num_variables)]


def _read_shared(
    arrays: Mapping[str, np.ndarray], description: dict[str, Any]
) -> list[np.ndarray] | None:
    if description.get("format", 1) == 1:
        return None
    return [
        np.asarray(arrays[_shared_name(i)])
        for i in range(description["shared"])
    ]


def _check_format(description: dict[str, Any]) -> None:
    number = description.get("format", 1)
    if number > _FORMAT:
        raise NewerFormatError(
            f"The saved state must be of a format up to {_FORMAT}: load it "
            f"with tf_regtopk {description.get('library')} or newer. Received: "
            f"format {number}"
        )


def to_bytes(
    saved: SavedState, variables: Iterable[npt.ArrayLike] = ()
) -> bytes:
    """Converts what `to_arrays` takes to the bytes of an .npz file."""
    file = io.BytesIO()
    # Any, because a checker would take an array for `allow_pickle`.
    arrays: dict[str, Any] = to_arrays(saved, variables)
    np.savez(file, **arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> tuple[SavedState, list[np.ndarray]]:
    """Inverts `to_bytes`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return from_arrays(arrays)


def is_saved_in(names: Iterable[str]) -> bool:
    """Returns whether `to_arrays` has written the arrays of these names."""
    return _DESCRIPTION in names


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """Computes CRC-32 of the bytes of some arrays, one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def canonical_names(names: Sequence[str]) -> list[str]:
    """Returns names of variables that stay the same in the next program.

    `dense_3` and `dense_5` of one program may be `dense` and `dense_1` of the
    next: so only the order of the numbers after a word counts. The model's name
    may or may not come first, depending on the way the model was built: so only
    the names of the layer and of the variable count.

    Args:
        names: List of strings, the paths of Keras variables.

    Returns:
        List of strings.

    Example:

    >>> canonical_names(["model/dense_3/kernel", "model/dense_5/kernel"])
    ['dense_0/kernel_0', 'dense_1/kernel_0']
    >>> canonical_names(["dense/kernel", "dense_1/kernel"])
    ['dense_0/kernel_0', 'dense_1/kernel_0']
    """
    names = ["/".join(name.split("/")[-2:]) for name in names]
    word = re.compile(r"([^/]*?)(?:_(\d+))?(?=/|$)")
    numbers: dict[str, set[int]] = {}
    for name in names:
        for base, number in word.findall(name):
            numbers.setdefault(base, set()).add(int(number or 0))
    rank = {base: sorted(found) for base, found in numbers.items()}

    def renumber(match: re.Match[str]) -> str:
        base, number = match.groups()
        return base and f"{base}_{rank[base].index(int(number or 0))}"

    return [word.sub(renumber, name) for name in names]


def check_layout(
    saved: dict[str, Any],
    layout: dict[str, Any],
    rule: str = "The saved residual errors must be of an optimizer with",
) -> None:
    """Raises unless a saved layout equals that of the loading optimizer."""
    for key in sorted({*layout, *saved}):
        expected, received = layout.get(key), saved.get(key)
        if expected != received:
            advice = ""
            if key == DENSE_VARIABLES:
                advice = ". (`dense_below` says which variables these are)"
            raise ValueError(
                f"{rule} {key}={expected}. Received: {key}={received}{advice}"
            )


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


def _name(replica: int, part: int) -> str:
    return f"replica_{replica}_part_{part}"


def _shared_name(part: int) -> str:
    return f"shared_part_{part}"


def _accumulated_name(replica: int | str, device: int, part: int) -> str:
    return f"replica_{replica}_device_{device}_accumulated_{part}"
