"""The fastest exchange, measured among all workers."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import time

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import error_feedback
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.steps import layout as layout_lib
from tf_regtopk.steps import partition as partition_lib

# Timed runs of each exchange. One run is enough if all others take this ratio
# times as long as the fastest.
_NUM_RUNS = 5
_CLEAR_RATIO = 2.0
# The dense exchange loses nothing, and owners keep fewer entries than an
# all-gather has. So an exchange has to be faster than those before by this.
_ADVANTAGE = 1.05
_BY_ACCURACY: tuple[layout_lib.Exchange, ...] = (
    "dense",
    "all_gather",
    "sparse",
)


def measure(
    exchanges: Mapping[str, Callable[[], tf.Tensor]],
) -> dict[str, float]:
    """Runs exchanges in turn, and tells how long a step spends in each.

    To be called in the scope of the strategy, outside of its replicas, by all
    workers at the same time.

    Args:
        exchanges: Dict from the names of two exchanges or more to functions of
            no arguments, for a replica context; each returns a tensor that is
            there when the exchange is done.

    Returns:
        Dict from name to seconds, the same on every worker: the slowest
        worker's median.
    """
    strategy = tf.distribute.get_strategy()
    runs = {
        name: tf.function(lambda function=function: strategy.run(function))
        for name, function in exchanges.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def run_all() -> None:
        for name, run in runs.items():
            start = time.perf_counter()
            for result in strategy.experimental_local_results(run()):
                result.numpy()  # Waits for it.
            seconds[name].append(time.perf_counter() - start)

    def of_all_replicas() -> np.ndarray:
        medians = [np.median(times) for times in seconds.values()]
        # Integers are gathered, because all workers must see the same numbers.
        microseconds = collectives.gather_from_workers(
            [min(round(1e6 * t), 2**31 - 1) for t in medians], strategy
        )
        return 1e-6 * np.max(microseconds, axis=0)

    run_all()  # Traces and compiles.
    seconds = {name: [] for name in runs}
    run_all()
    slowest = of_all_replicas()
    fastest, second, *_ = sorted(slowest)
    if second < _CLEAR_RATIO * fastest:
        for _ in range(_NUM_RUNS - 1):
            run_all()
        slowest = of_all_replicas()
    return dict(zip(runs, map(float, slowest), strict=True))


def trial(
    partition: partition_lib.Partition, variables: Sequence[keras.Variable]
) -> Callable[[], tf.Tensor]:
    """Returns a function that exchanges random gradients once, for `measure`.

    Args:
        partition: `partition.Partition` of the variables.
        variables: List of the variables.
    """

    def run() -> tf.Tensor:
        seed = strategy_lib.replica_rank()
        gradients = [
            tf.cast(tf.random.stateless_normal(v.shape, [slot, seed]), v.dtype)
            for slot, v in enumerate(variables)
        ]
        progress = error_feedback.Progress(tf.ones([]), tf.zeros([], tf.int64))
        _, exchanged = partition.exchange(gradients, progress)
        sums = partition.aggregate(exchanged, [True] * len(variables), progress)
        # One entry of every sum is read, because TensorFlow would prune the
        # computation of a sum that nobody reads.
        return tf.add_n(
            [
                tf.reduce_sum(tf.cast(tf.reshape(s, [-1])[:1], tf.float32))
                for s in sums
            ]
        )

    return run


def choose(seconds: Mapping[str, float]) -> layout_lib.Exchange:
    """The best of the measured exchanges.

    Args:
        seconds: Dict from `"sparse"`, `"dense"` and perhaps `"all_gather"` to
            seconds.

    Returns:
        The name of the best.

    Example:

    >>> choose({"sparse": 0.02, "dense": 0.5})
    'sparse'
    >>> choose({"sparse": 0.02, "dense": 0.0201})
    'dense'
    >>> choose({"sparse": 0.02, "all_gather": 0.0201, "dense": 0.5})
    'all_gather'
    """
    chosen, *others = (kind for kind in _BY_ACCURACY if kind in seconds)
    for kind in others:
        if _ADVANTAGE * seconds[kind] < seconds[chosen]:
            chosen = kind
    return chosen
