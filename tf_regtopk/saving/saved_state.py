"""The saved state of replicas, as arrays and as bytes with checksums."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import io
import json
from typing import Any
from typing import NamedTuple
import zlib

import numpy as np
import numpy.typing as npt

from tf_regtopk import version

_DESCRIPTION = "replica_state"
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


def _name(replica: int, part: int) -> str:
    return f"replica_{replica}_part_{part}"


def _shared_name(part: int) -> str:
    return f"shared_part_{part}"


def _accumulated_name(replica: int | str, device: int, part: int) -> str:
    return f"replica_{replica}_device_{device}_accumulated_{part}"
