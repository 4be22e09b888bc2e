"""Checks of entries that are summed by their owners."""

from collections.abc import Iterator
import functools
from typing import Any

import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.distribute import collectives
from tf_regtopk.kernels import words
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.trial import CheckError

_LENGTH = 1000


def reduce_scatter(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks the all-to-all, and steps by which owners sum the entries."""
    yield (
        "all-to-all of known words",
        functools.partial(exchange_known_words, devices.all),
    )
    forms: dict[str, dict[str, Any]] = {
        "RegTopK, Accumulate": {
            "sparsifier": parts.SPARSIFIERS["RegTopK"],
        },
        "TopK, natural, LearnedShift, little room": {
            "sparsifier": parts.SPARSIFIERS["TopK"],
            "codec": tf_regtopk.Codec(values="natural"),
            "error_feedback": parts.RULES["LearnedShift"],
            "topology": tf_regtopk.ReduceScatter(capacity=1.0, keep=0.5),
        },
    }
    for name, form in forms.items():
        yield (
            name,
            functools.partial(
                parts.run_case,
                devices.all,
                **{"topology": tf_regtopk.ReduceScatter(), **form},
            ),
        )


def exchange_known_words(strategy: tf.distribute.Strategy) -> None:
    """Lets each replica send each other one words that both can compute."""
    num_replicas = strategy.num_replicas_in_sync
    expected = _known_words(num_replicas)
    held = words.hold_array(expected, tf.int32)

    def exchange() -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        replica = tf.convert_to_tensor(context.replica_id_in_sync_group)
        return collectives.all_to_all(tf.gather(tf.constant(held), replica))

    run = tf.function(lambda: strategy.run(exchange), autograph=False)
    received = strategy.experimental_local_results(run())
    receivers = []
    for number, of_replica in enumerate(received):
        # TensorFlow chooses the order of the rows, and who is which receiver.
        rows = words.release_array(of_replica.numpy(), tf.int32)
        rows = rows[np.argsort(rows[:, 0])]
        receiver = int(rows[0, 1])
        receivers.append(receiver)
        trial_lib.expect_same(
            f"words that replica {number} has received",
            rows,
            expected[:, receiver % num_replicas],
            f"those sent to {receiver}",
        )
    if sorted(receivers) != [*range(num_replicas)]:
        raise CheckError(
            "the words for each replica must have one receiver, and the "
            f"replicas have received those for {receivers}"
        )


def _known_words(num_replicas: int) -> np.ndarray:
    """Words `[sender, receiver, length]`, which begin with these numbers.

    The others have any bits, also those of floats that are no numbers.
    """
    shape = (num_replicas, num_replicas, _LENGTH)
    known = np.random.default_rng(0).integers(
        -(2**31), 2**31, shape, dtype=np.int32
    )
    known[..., 0] = np.arange(num_replicas)[:, np.newaxis]
    known[..., 1] = np.arange(num_replicas)
    return known
