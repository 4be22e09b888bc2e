"""Numbers about the wrapper in the logs of `fit`."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_regtopk import validation
from tf_regtopk.callbacks import of_models
from tf_regtopk.callbacks import summaries
from tf_regtopk.codecs import WireReport
from tf_regtopk.distribute import agreement
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.log import logger

_PREFIX = "sparse_"
# Of `telemetry()`: norms, and numbers of entries, shown as shares of k.
_NORMS = ("gradient", "accumulated", "sent", "residual")
_COUNTS = ("unlike_top_k", "damped", "selected_again")
# The table after training has no more rows, and heat maps no more columns.
_MOST_ROWS, _MOST_COLUMNS = 10, 512


class Monitor(keras.callbacks.Callback):
    """Shows what the wrapper does to a training.

    At the end of each epoch these numbers join the logs of `fit`: the progress
    bar and `History` show them, and so do the callbacks (`CSVLogger`,
    `TensorBoard`) that come after this one in the list.

        sparse_density       the density in force; 1 if the exchange is dense
        sparse_bytes         what a replica sends per exchange
        sparse_compression   how many times as much it sends without the wrapper
        sparse_skipped       steps of the epoch that were skipped

    With `SparsifiedOptimizer(telemetry=True)` also, of the last step of the
    epoch:

        sparse_residual      |what is held back| / |gradient|
        sparse_unlike_top_k  share of the selected entries that Top-k would not
                             have selected
        sparse_cancelled     share of what was sent that cancelled out in the
                             sum over the replicas
        sparse_damped, ...   what the sparsifier measures: of `RegTopK` the
                             entries damped and selected again, as shares of k
        sparse_exchange_seconds
                             time from a replica's payload to those of all:
                             sending, and waiting for slower replicas
        sparse_oldest        the most steps for which an entry has not been
                             sent; only with `telemetry="ages"`

    The numbers are those of all replicas of all workers, and the same on every
    worker: norms as root mean squares, the largest age, and means of the
    others. So every worker gives this callback to `fit`, as it does with every
    argument of the training.

    Args:
        log_dir: Path of a folder, or None. The first worker writes the numbers
            of each epoch there, for TensorBoard, which need not be installed.
        every: Integer n, or None. With `log_dir`, the numbers of every n-th
            batch are written as well, over the steps taken. Of several workers
            they are those of the first worker's replicas. Other batches read
            nothing.
        per_variable: Boolean. With `log_dir`, of each variable that is
            exchanged sparsely the share of the k entries that it gets and the
            norm of what is held back are written as well, and an image of all
            shares over time. Of the first worker's replicas.
        summary: Boolean. Whether a table of the first and the last epoch is
            logged after training, unless `fit` was called with `verbose=0`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `every` or `per_variable` is given without `log_dir`.

    Example:

    >>> import tf_regtopk
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(9)])
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    >>> model = tf_regtopk.wrap(
    ...     model, tf_regtopk.TopK(density=0.25), telemetry=True)
    >>> history = model.fit(
    ...     tf.ones([8, 3]), tf.ones([8, 9]), verbose=0,
    ...     callbacks=[Monitor()])
    >>> history.history["sparse_density"], history.history["sparse_skipped"]
    ([0.25], [0])
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        every: int | None = None,
        per_variable: bool = False,
        summary: bool = True,
    ) -> None:
        super().__init__()
        if every is not None:
            validation.check_integer("every", every, 1)
        validation.check_boolean("per_variable", per_variable)
        validation.check_boolean("summary", summary)
        if log_dir is None and (every is not None or per_variable):
            raise ValueError(
                "`log_dir` must be a folder if `every` or `per_variable` is "
                f"given. Received: {log_dir=}, {every=}, {per_variable=}"
            )
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.every = every
        self.per_variable = per_variable
        self.summary = summary
        # Keras then need not wait for the results of each batch.
        self.async_safe = every is None
        self._writer: summaries.Writer | None = None
        self._reported: tuple[int, WireReport] | None = None
        self._is_chief = True
        self._has_told = False
        self._first: tuple[int, dict[str, float]] | None = None
        self._last: tuple[int, dict[str, float]] | None = None
        self._shares: list[np.ndarray] = []
        self._num_skipped_before = 0
        self._num_due = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = of_models.of_model(self.model, has_gradients=True)
        strategy = self.model.distribute_strategy
        _check_all_workers_monitor(strategy, optimizer)
        self._is_chief = strategy_lib.worker_number(strategy)[0] == 0
        self._first = self._last = self._reported = None
        self._shares = []
        if not optimizer.has_telemetry:
            if self.per_variable:
                raise ValueError(
                    "The optimizer must be created with `telemetry=True` for "
                    "`Monitor(per_variable=True)`. Received: telemetry=False"
                )
            self._tell_what_is_missing(optimizer)
        if self.log_dir is not None and self._is_chief:
            self._writer = summaries.Writer(self.log_dir)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._num_due = 0
        self._num_skipped_before = _num_skipped(of_models.of_model(self.model))

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self.every is None or not self._writer:
            return
        # With `steps_per_execution` several batches end at once.
        num_due = (batch + 1) // self.every
        if num_due > self._num_due:
            self._num_due = num_due
            optimizer = of_models.of_model(self.model)
            found = _measured(optimizer)
            self._write("batch", optimizer, found, _combine(found))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        optimizer = of_models.of_model(self.model)
        found = _measured(optimizer)
        combined = _combine_workers(
            _combine(found), self.model.distribute_strategy
        )
        numbers = self._numbers(optimizer, combined)
        if logs is not None:
            logs.update(numbers)
        self._first = self._first or (epoch, numbers)
        self._last = (epoch, numbers)
        if self._writer:
            self._write("epoch", optimizer, found, combined, epoch)
            self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
        verbose = (self.params or {}).get("verbose", "auto")
        if self.summary and self._is_chief and self._last and verbose != 0:
            assert self._first is not None
            logger.info("%s", _table(self._first, self._last))

    def _numbers(
        self, optimizer: Any, combined: Mapping[str, float]
    ) -> dict[str, float]:
        """The numbers by their names in the logs."""
        numbers: dict[str, float] = {
            **_of_report(optimizer, self._report(optimizer)),
            "skipped": _num_skipped(optimizer) - self._num_skipped_before,
            **_of_telemetry(combined, optimizer.sparsifier.measured),
        }
        return {f"{_PREFIX}{name}": value for name, value in numbers.items()}

    def _report(self, optimizer: Any) -> WireReport:
        """The wire report, which is made anew when the exchange changes."""
        if self._reported is None or self._reported[0] != optimizer.changes:
            self._reported = optimizer.changes, optimizer.wire_report()
        return self._reported[1]

    def _write(
        self,
        interval: str,
        optimizer: Any,
        found: Sequence[Mapping[str, Any]],
        combined: Mapping[str, float],
        epoch: int | None = None,
    ) -> None:
        """Writes the numbers of a batch, or of an epoch, for TensorBoard."""
        assert self._writer is not None
        step = int(optimizer.iterations.numpy()) if epoch is None else epoch
        # TensorBoard shows in one group what has a name before the slash in
        # common.
        group = f"{_PREFIX}{interval}"
        numbers = {
            f"{group}/{name.removeprefix(_PREFIX)}": value
            for name, value in self._numbers(optimizer, combined).items()
        }
        if self.per_variable and combined:
            residuals, shares = _by_variable(found)
            for path, residual, share in zip(
                optimizer.sparse_variables, residuals, shares, strict=True
            ):
                numbers[f"{group}_residual/{path}"] = float(residual)
                numbers[f"{group}_share_of_k/{path}"] = float(share)
            self._shares = [*self._shares, shares][-_MOST_COLUMNS:]
        self._writer.scalars(numbers, step)
        if self._shares and epoch is not None:
            self._writer.image(
                f"{group}_share_of_k", summaries.heat_map(self._shares), step
            )

    def _tell_what_is_missing(self, optimizer: Any) -> None:
        if self._is_chief and not self._has_told:
            self._has_told = True
            names = (
                "residual",
                "unlike_top_k",
                "cancelled",
                "exchange_seconds",
                *optimizer.sparsifier.measured,
            )
            logger.info(
                "`Monitor` shows the density, bytes and skipped steps. With "
                "`SparsifiedOptimizer(telemetry=True)` it also shows: %s.",
                ", ".join(names),
            )


def _check_all_workers_monitor(
    strategy: tf.distribute.Strategy, optimizer: Any
) -> None:
    """Raises unless all workers have a `Monitor` of the same telemetry."""
    try:
        with strategy.scope():
            agreement.check(lambda: {"telemetry": optimizer.has_telemetry})
    except tf.errors.OpError as error:
        error.add_note(
            "Did every worker give a `Monitor` to `fit`? The workers meet in "
            "it, so that all of them have the same logs."
        )
        raise


def _measured(optimizer: Any) -> list[dict[str, Any]]:
    """For each local participant its numbers; empty where there are none."""
    if not optimizer.has_telemetry:
        return []
    return [found for found in optimizer.telemetry() if found]


def _num_skipped(optimizer: Any) -> int:
    return int(optimizer.skipped_steps.numpy())


def _combine(of_all: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Makes one number of those of several participants, or workers.

    Example:

    >>> _combine([{"sent": 1.0, "oldest": 2.0}, {"sent": 7.0, "oldest": 3.0}])
    {'sent': 5.0, 'oldest': 3.0}
    """
    if not of_all:
        return {}
    combined = {}
    for name, value in of_all[0].items():
        if np.ndim(value):
            continue
        values = np.array([of_one[name] for of_one in of_all], np.float64)
        if name in _NORMS:
            result = np.sqrt(np.mean(np.square(values)))
        elif name == "oldest":
            result = np.max(values)
        else:
            result = np.mean(values)
        combined[name] = float(result)
    return combined


def _combine_workers(
    combined: dict[str, float], strategy: tf.distribute.Strategy
) -> dict[str, float]:
    """The numbers of all workers, the same on each of them."""
    if not combined or strategy_lib.worker_number(strategy)[1] == 1:
        return combined
    # Integers are gathered, which hold floats of the same bits.
    held = np.array([*combined.values()], np.float32).view(np.int32)
    gathered = collectives.gather_from_workers(held.tolist(), strategy)
    of_replicas = gathered.astype(np.int32).view(np.float32)
    of_workers = [dict(zip(combined, row, strict=True)) for row in of_replicas]
    return _combine(of_workers)


def _of_report(optimizer: Any, report: WireReport) -> dict[str, float]:
    """The numbers that need no telemetry."""
    is_dense = not report.num_selected
    sent, dense = report.sent_bytes, report.dense_sent_bytes
    return {
        "density": 1.0 if is_dense else float(optimizer.density),
        "bytes": sent,
        # Nothing is sent by a single replica, with and without the wrapper.
        "compression": dense / sent if sent else 1.0,
    }


def _of_telemetry(
    combined: Mapping[str, float], measured: Sequence[str]
) -> dict[str, float]:
    """The numbers of a step, as shares.

    Example:

    >>> numbers = {"gradient": 2.0, "residual": 6.0, "selected": 10.0,
    ...            "unlike_top_k": 5.0, "cancelled": 0.25, "damped": 1.0,
    ...            "exchange_seconds": 0.5}
    >>> shares = _of_telemetry(numbers, ["damped"])
    >>> shares["residual"], shares["unlike_top_k"], shares["damped"]
    (3.0, 0.5, 0.1)
    """
    if not combined:
        return {}

    num_selected = max(combined["selected"], 1)

    def share_of(name: str) -> float:
        return combined[name] / (num_selected if name in _COUNTS else 1)

    gradient = combined["gradient"]
    shares = {
        # Zero before the first step, of which there are no numbers yet.
        "residual": combined["residual"] / gradient if gradient else 0.0,
        **{
            name: share_of(name)
            for name in ("unlike_top_k", "cancelled", *measured)
        },
        "exchange_seconds": combined["exchange_seconds"],
    }
    if "oldest" in combined:
        shares["oldest"] = combined["oldest"]
    return shares


def _by_variable(
    found: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray]:
    """Norms of what is held back, and shares of k, of each variable."""
    residuals = np.array([one["residual_by_variable"] for one in found])
    selected = np.sum([one["selected_by_variable"] for one in found], axis=0)
    return (
        np.sqrt(np.mean(np.square(residuals), axis=0)),
        selected / max(float(selected.sum()), 1),
    )


def _table(
    first: tuple[int, Mapping[str, float]],
    last: tuple[int, Mapping[str, float]],
) -> str:
    """The numbers of the first and the last epoch, a line for each.

    Example:

    >>> print(_table((0, {"sparse_bytes": 48}), (9, {"sparse_bytes": 16})))
    What was exchanged, in the first and the last epoch:
                           epoch 1      epoch 10
    bytes                       48            16
    """
    (epoch, before), (last_epoch, after) = first, last
    lines = [
        "What was exchanged, in the first and the last epoch:",
        _line("", f"epoch {epoch + 1}", f"epoch {last_epoch + 1}"),
    ]
    for name in [*after][:_MOST_ROWS]:
        cells = [
            _cell(numbers[name]) if name in numbers else ""
            for numbers in (before, after)
        ]
        lines.append(_line(name.removeprefix(_PREFIX), *cells))
    return "\n".join(lines)


def _cell(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"


def _line(name: str, *cells: str) -> str:
    return f"{name:16}" + "".join(f"{cell:>14}" for cell in cells)
