"""A check that all workers were given the same arguments."""

from collections.abc import Callable
from collections.abc import Mapping
import json
from typing import Any
import zlib

import tensorflow as tf

from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib

# Hashes that are gathered, so that versions with other facts can compare.
_MOST_FACTS = 32


def check(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Raises on every worker unless all workers describe the same facts.

    To be called in the scope of the strategy, outside of its replicas, by all
    workers at the same time. Without several workers nothing is done.

    Args:
        describe: Function that returns a dict from the name of an argument to
            a value that JSON can hold, with the same names on every worker.

    Raises:
        ValueError: If facts differ. The error names them.

    Example:

    >>> check(lambda: {"version": "0.2.0", "scope": "global"})
    """
    strategy = tf.distribute.get_strategy()
    worker, num_workers = strategy_lib.worker_number(strategy)
    if num_workers == 1:
        return
    facts = describe()
    hashes = [_hash(value) for value in facts.values()]
    gathered = collectives.gather_from_workers(
        hashes + [0] * (_MOST_FACTS - len(hashes)), strategy
    )
    # One row for each worker, because its replicas say the same.
    of_workers = gathered[:: len(gathered) // num_workers]
    for i, (name, value) in enumerate(facts.items()):
        others = (of_workers[:, i] != of_workers[worker, i]).nonzero()[0]
        if len(others):
            raise ValueError(
                f"All workers must have the same `{name}`, because their "
                "replicas exchange entries and apply the same sum. Run one "
                "program with one set of flags on all workers. Received: "
                f"{name}={value} on worker {worker}, and something else on "
                f"{'worker' if len(others) == 1 else 'workers'} "
                f"{', '.join(map(str, others))}"
            )


def _hash(value: Any) -> int:
    """An int32 that hardly any other value has."""
    text = json.dumps(value, sort_keys=True, default=str)
    return zlib.crc32(text.encode()) & 0x7FFFFFFF
