"""Loading what all workers have saved, all or nothing."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import itertools
import os
from typing import Any

import keras
import tensorflow as tf

from tf_regtopk.distribute import strategy as strategy_lib
from tf_regtopk.optimizers import of_models
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files

# Errors that TensorFlow raises in a collective that a worker has left.
_LOST_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)


@contextlib.contextmanager
def load_scope(
    path: str | os.PathLike[str],
    strategy: tf.distribute.Strategy,
    model: keras.Model | None = None,
) -> Iterator[str]:
    """Finds what all workers have saved for `path`, and loads all or nothing.

    For what was saved to `worker_path(path, strategy)`, by as many workers as
    there are now or by others, or by one alone to `path`. Gives the path that
    this worker is to load.

    Args:
        path: Path of a file, a folder or a checkpoint, the same on every
            worker.
        strategy: The `tf.distribute.Strategy` that the model trains under.
        model: The `keras.Model` that is loaded into, with built optimizers. If
            loading fails it is put back to what it was.

    Raises:
        FileNotFoundError: If nothing was saved, or the files of some workers
            are missing.
        ValueError: If loading failed, nothing was loaded, or it is not what
            was saved.

    Example:

    ```python
    with tf_regtopk.load_scope("m.weights.h5", strategy, model) as own_path:
        model.load_weights(own_path)
    ```
    """
    files = worker_files.find_files(path, strategy)
    if not files:
        raise FileNotFoundError(
            "There must be a file of one worker, or of each worker of a run. "
            f"Received: path={os.fspath(path)!r}"
        )
    number, _ = strategy_lib.worker_number(strategy)
    own_path = files[number % len(files)]
    try:
        with put_back_on_error(model), worker_files.reading(files) as loaded:
            yield own_path
            _check_loaded(loaded, model)
    except _LOST_ERRORS:
        raise
    except Exception as e:
        raise ValueError(
            "`path` must hold what can be loaded here. Received: "
            f"{own_path!r}, with which loading ended in {type(e).__name__}: {e}"
        ) from e


def _check_loaded(
    loaded: Sequence[saved_state.SavedState], model: keras.Model | None
) -> None:
    if not loaded:
        raise ValueError(
            "The residual errors must be loaded within `load_scope`. Received: "
            "an optimizer that was not built, or files without them. Call "
            "`optimizer.build(model.trainable_variables)` first; and load "
            "what was saved by a plain optimizer without `load_scope`"
        )
    if model is not None:
        moments = [saved.moment for saved in loaded]
        for optimizer in of_models.all_of_model(model):
            if _state_of(optimizer.moment) not in map(_state_of, moments):
                raise ValueError(
                    "The weights must be those that were saved. Received: "
                    f"{optimizer.moment} after loading {moments}"
                )


def _state_of(moment: dict[str, Any]) -> dict[str, Any]:
    """A moment, alike for exchanges whose state is the same."""
    if moment.get("exchange") != "all_gather":
        return moment
    return {**moment, "exchange": "sparse"}


@contextlib.contextmanager
def put_back_on_error(model: keras.Model | None) -> Iterator[None]:
    """Puts a model and its optimizer back if the block raises."""
    if model is None:
        yield
        return
    optimizers = of_models.all_of_model(model)
    # Every replica's value is kept, because batch normalisation has averages
    # of its own on each.
    variables = [
        local
        for variable in itertools.chain(
            model.variables,
            *(o.variables for o in of_models.optimizers_of(model)),
        )
        for local in model.distribute_strategy.experimental_local_results(
            variable.value
        )
    ]
    values = [variable.numpy() for variable in variables]
    states = [optimizer.save_state() for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state(state)
        raise
