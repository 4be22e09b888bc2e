"""A multi-worker strategy under which Keras 3 can train."""

from typing import Any

import tensorflow as tf

from tf_regtopk import keras_internals
from tf_regtopk import validation
from tf_regtopk.distribute import watchdog
from tf_regtopk.launch import notes

# The dtypes that the collective all-reduce takes.
_REDUCIBLE = (
    tf.bfloat16,
    tf.float16,
    tf.float32,
    tf.float64,
    tf.int32,
    tf.int64,
)


def worker_number(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """`(number of this worker, number of workers)` of a strategy."""
    return _number_in(getattr(strategy, "cluster_resolver", None))


def has_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether the first worker of a strategy is of the job "chief"."""
    resolver = getattr(strategy, "cluster_resolver", None)
    return resolver is not None and "chief" in resolver.cluster_spec().jobs


def replica_rank() -> tf.Tensor:
    """The rank of this replica, a scalar int32 tensor, in a replica context."""
    replica = tf.distribute.get_replica_context()
    return tf.convert_to_tensor(replica.replica_id_in_sync_group)


def _number_in(
    resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
) -> tuple[int, int]:
    spec = resolver.cluster_spec().as_dict() if resolver else {}
    # The chief, if there is one by that name, is the first replica.
    counts = {job: len(spec.get(job, ())) for job in ("chief", "worker")}
    if resolver is None or sum(counts.values()) < 2:
        return 0, 1
    before = counts["chief"] if resolver.task_type == "worker" else 0
    return before + resolver.task_id, sum(counts.values())


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy` that Keras 3 can train under.

    Upstream, `fit()` and `evaluate()` stop with an error as soon as there are
    two workers (keras#20585, tensorflow#72388). Keras calls
    `strategy.reduce()` on a whole batch, which is a tuple, and with `axis=0`
    on the scalar logs of a step; TensorFlow takes neither. Here `reduce()`
    takes both, and everything else is inherited.

    Args:
        cluster_resolver: Optional
            `tf.distribute.cluster_resolver.ClusterResolver`. Defaults to the
            cluster that the environment variable `TF_CONFIG` describes.
        communication_options: Optional
            `tf.distribute.experimental.CommunicationOptions`. Better without a
            `timeout_seconds` of its own, for which TensorFlow starts a thread
            for each collective that sleeps for as long.
        timeout_seconds: Positive float, or None. When a worker has not taken
            part for so long in what the others wait for, these end with a
            `DeadlineExceededError`; upstream, and with None, they wait for
            ever. It has to be longer than what one worker does alone, such as
            saving. Covers the exchange of `SparsifiedOptimizer`, `reduce`,
            `gather` and so `fit`, `evaluate` and `predict`; not the collectives
            of another optimizer.

    Raises:
        TypeError: If `timeout_seconds` is no number.
        ValueError: If `timeout_seconds` is not positive.

    Example:

    ```python
    strategy = tf_regtopk.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(10)])
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    model.fit(train_dataset, validation_data=validation_dataset)
    ```

    Two limits remain. The first batch given to `fit()` or `evaluate()` has to
    split evenly among the replicas, as it has to under
    `tf.distribute.MirroredStrategy`. And a metric whose result is a vector
    shows as the mean of its entries while an epoch runs and in what
    `train_on_batch()` returns; its value at the end of an epoch is right.
    """

    def __init__(
        self,
        cluster_resolver: (
            tf.distribute.cluster_resolver.ClusterResolver | None
        ) = None,
        communication_options: (
            tf.distribute.experimental.CommunicationOptions | None
        ) = None,
        timeout_seconds: float | None = 600.0,
    ) -> None:
        if timeout_seconds is not None:
            validation.check_number(
                "timeout_seconds", timeout_seconds, "positive", lambda t: t > 0
            )
        resolver = cluster_resolver or (
            tf.distribute.cluster_resolver.TFConfigClusterResolver()
        )
        number = str(_number_in(resolver)[0])
        notes.write("arrived", number)
        super().__init__(
            cluster_resolver=cluster_resolver,
            communication_options=communication_options,
        )
        notes.write("met", number)  # TensorFlow has waited for all workers.
        keras_internals.let_collectives_run_in_loops(self)
        self.watchdog = None
        if timeout_seconds is not None and worker_number(self)[1] > 1:
            self.watchdog = watchdog.Watchdog(timeout_seconds)

    @property
    def is_chief(self) -> bool:
        """True on the worker that writes what only one is to write."""
        return worker_number(self)[0] == 0

    def reduce(
        self,
        reduce_op: tf.distribute.ReduceOp | str,
        value: Any,
        axis: int | None,
    ) -> Any:
        """Reduces `value` across replicas, as upstream does and beyond.

        Args:
            reduce_op: A `tf.distribute.ReduceOp`, or its name: `"SUM"` or
                `"MEAN"`.
            value: A per-replica value or a structure (tuple, dict, nested) of
                them. In a structure, and for a dtype that collectives do not
                take, a result keeps the dtype of its value. The `"MEAN"` of
                strings is the value of the first local replica.
            axis: The axis to reduce within each replica, or `None`. `0` is
                the same as `None` for scalars.

        Returns:
            A tensor, or a structure like `value` of tensors.
        """
        if isinstance(reduce_op, str):
            reduce_op = tf.distribute.ReduceOp(reduce_op.upper())
        if tf.nest.is_nested(value):
            return tf.nest.map_structure(
                lambda leaf: self._reduce_leaf(
                    reduce_op, leaf, axis, keep_dtype=True
                ),
                value,
            )
        return self._reduce_leaf(reduce_op, value, axis)

    def gather(
        self, value: tf.distribute.DistributedValues, axis: int
    ) -> tf.Tensor:
        """Gathers `value` across replicas, as upstream does."""
        gather = super().gather
        return watchdog.watched(lambda: gather(value, axis), self)

    def _reduce_leaf(
        self,
        reduce_op: tf.distribute.ReduceOp,
        value: Any,
        axis: int | None,
        keep_dtype: bool = False,
    ) -> tf.Tensor:
        local = self.experimental_local_results(value)[0]
        if not hasattr(local, "dtype"):
            local = tf.convert_to_tensor(local)
        dtype = tf.as_dtype(local.dtype)

        if axis == 0 and tf.TensorShape(local.shape).rank == 0:
            axis = None
        if dtype == tf.string and reduce_op == tf.distribute.ReduceOp.MEAN:
            # Keras only wants to know the shape and the dtype.
            return local
        if dtype.is_bool or (dtype.is_integer and dtype not in _REDUCIBLE):
            wide = tf.int32 if dtype.size < 4 else tf.int64
            value = self.run(
                tf.function(lambda v: tf.cast(v, wide)), args=(value,)
            )
            keep_dtype = True
        reduce = super().reduce
        result = watchdog.watched(lambda: reduce(reduce_op, value, axis), self)
        # The mean of integers is float64 upstream.
        return tf.cast(result, dtype) if keep_dtype else result
