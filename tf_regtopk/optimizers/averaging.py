"""The mean of replicas that have weights of their own."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import zlib

import keras
import tensorflow as tf

from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import replica_state
from tf_regtopk.distribute import strategy as strategy_lib

_INT32 = 2**31 - 1


def average(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> None:
    """Gives every replica the mean over all replicas, by an all-reduce.

    To be called outside of the replicas, on all workers at the same time.

    Args:
        variables: List of variables of floats.
        strategy: Their `tf.distribute.Strategy`.
    """

    def of_replica() -> None:
        for part, mean in zip(*_parts_and_means(variables), strict=True):
            part.assign(tf.cast(mean, part.dtype))

    strategy.run(tf.function(of_replica, autograph=False))


@contextlib.contextmanager
def weights_kept(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> Iterator[None]:
    """Gives each replica of this process back what it had.

    Args:
        variables: List of variables.
        strategy: Their `tf.distribute.Strategy`.
    """
    parts = [replica_state.parts(v, strategy) for v in variables]
    kept = [[part.read_value() for part in of_one] for of_one in parts]
    try:
        yield
    finally:
        for of_one, values in zip(parts, kept, strict=True):
            for part, value in zip(of_one, values, strict=True):
                part.assign(value)


def are_local(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether all replicas are those of this process."""
    return strategy_lib.worker_number(strategy)[1] == 1


def are_alike(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> bool:
    """Returns whether all replicas have the same values, to the bit.

    To be called outside of the replicas, on all workers at the same time.

    Args:
        variables: List of variables.
        strategy: Their `tf.distribute.Strategy`.
    """
    values = [
        [part.numpy() for part in replica_state.parts(variable, strategy)]
        for variable in variables
    ]
    checksums = {
        zlib.crc32(b"".join(part.tobytes() for part in of_replica))
        for of_replica in zip(*values, strict=True)
    }
    if len(checksums) > 1 or are_local(strategy):
        return len(checksums) <= 1
    [checksum] = checksums
    numbers = collectives.gather_from_workers([checksum & _INT32], strategy)
    return bool((numbers == numbers[0]).all())


def distance_function(
    variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> Callable[[], float]:
    """Returns a function that finds the distance of the replicas to the mean.

    Args:
        variables: As of `average`.
        strategy: As of `average`.

    Returns:
        Function of no arguments that returns sqrt of the mean over the replicas
        of |x_i - mean|^2. To be called as `average` is.
    """

    def of_replica() -> tf.Tensor:
        squares = [
            tf.reduce_sum(tf.square(_wide(part.read_value()) - mean))
            for part, mean in zip(*_parts_and_means(variables), strict=True)
        ]
        total = tf.add_n([tf.cast(square, tf.float32) for square in squares])
        [mean] = _means([total])
        return tf.sqrt(mean)

    traced = tf.function(of_replica, autograph=False)

    def distance() -> float:
        found = strategy.run(traced)
        return float(strategy.experimental_local_results(found)[0].numpy())

    return distance


def _parts_and_means(
    variables: Sequence[keras.Variable],
) -> tuple[list[tf.Variable], list[tf.Tensor]]:
    strategy = tf.distribute.get_strategy()
    local = [
        replica_state.local_part(variable, strategy) for variable in variables
    ]
    return local, _means([_wide(part.read_value()) for part in local])


def _means(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    n = tf.distribute.get_strategy().num_replicas_in_sync
    return [total / n for total in collectives.all_reduce_sum(tensors)]


def _wide(values: tf.Tensor) -> tf.Tensor:
    """Values in at least 32 bits, of which sums round little."""
    return values if values.dtype.size >= 4 else tf.cast(values, tf.float32)
