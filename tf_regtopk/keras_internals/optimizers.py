"""Private parts of Keras's optimizers."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import keras
import tensorflow as tf


class _SummedBefore:
    """Takes the place of Keras's sum over replicas, for the wrapper only."""

    def __init__(self) -> None:
        # A number, because each replica calls in a thread of its own.
        self.num_calls_under_way = 0

    def __call__(self, gradients: Sequence[Any]) -> list[Any]:
        strategy = tf.distribute.get_strategy()
        if not self.num_calls_under_way and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "`inner_optimizer` must be applied by its wrapper only, "
                "because it does not sum the gradients of the replicas any "
                "more: make a new optimizer, or take this one back by "
                "`tf_regtopk.unwrap(model)`. Received: a call of its own"
            )
        return list(gradients)


def take_aggregated_gradients(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes a Keras optimizer take gradients as already summed over replicas.

    Keras sums inside the optimizer, in `_all_reduce_sum_gradients`, after
    clipping and just before the update, and has no switch against the sum. The
    optimizer must be built already, because a `MultiOptimizer` gets its parts
    when it is built.

    From here on it is to be applied by `apply_aggregated`.
    """
    summed_before = _SummedBefore()
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        part._all_reduce_sum_gradients = summed_before


def apply_aggregated(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    variables: Sequence[keras.Variable],
) -> None:
    """Applies gradients that are summed over the replicas already.

    Args:
        optimizer: One that `take_aggregated_gradients` has changed.
        gradients: List of gradients, to be applied as they are.
        variables: List of the variables that they belong to.

    Raises:
        ValueError: If the optimizer was taken back.
    """
    summed_before = optimizer._all_reduce_sum_gradients
    if not isinstance(summed_before, _SummedBefore):
        raise ValueError(
            "`inner_optimizer` must belong to its wrapper, and "
            "`tf_regtopk.unwrap` has taken it back: wrap a new one. Received: "
            f"inner_optimizer={optimizer!r}"
        )
    summed_before.num_calls_under_way += 1
    try:
        optimizer.apply(gradients, variables)
    finally:
        summed_before.num_calls_under_way -= 1


def take_clipping(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[Sequence[Any]], list[Any]]:
    """Takes the clipping of gradients out of a Keras optimizer.

    Args:
        optimizer: Optimizer without parts, which clips nothing from now on.

    Returns:
        Function from the list of gradients, with None where there is none, to
        the list of the clipped ones, in which numbers that are not finite stay
        as they are. It follows the optimizer's settings.
    """
    clip = optimizer._clip_gradients
    optimizer._clip_gradients = list

    def clip_present(gradients: Sequence[Any]) -> list[Any]:
        clipped = iter(clip([g for g in gradients if g is not None]))
        return [
            None if g is None else _keep_non_finite(g, next(clipped))
            for g in gradients
        ]

    return clip_present


def _keep_non_finite(gradient: Any, clipped: Any) -> Any:
    """A clipped gradient, with the numbers that tell of a step to skip."""
    # `clipvalue` makes infinity finite, and `global_clipnorm` slices dense.
    if isinstance(clipped, tf.IndexedSlices):
        return tf.IndexedSlices(
            _keep_non_finite(gradient.values, clipped.values),
            clipped.indices,
            clipped.dense_shape,
        )
    gradient = tf.convert_to_tensor(gradient)
    return tf.where(tf.math.is_finite(gradient), clipped, gradient)


def sgd_like(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.SGD:
    """Makes an SGD with all settings of an optimizer that do not make its step.

    Args:
        optimizer: Keras optimizer, not built. Its learning rate may be a
            schedule or a function; variables may be excluded from weight decay.

    Returns:
        `keras.optimizers.SGD` without momentum.
    """
    settings = {
        name: getattr(optimizer, name)
        for name in keras.optimizers.SGD().get_config()
        if name != "learning_rate" and hasattr(optimizer, name)
    }
    rate = optimizer._learning_rate  # A function is called by its public name.
    if not callable(rate):
        rate = float(rate.numpy())
    sgd = keras.optimizers.SGD(rate, **settings)
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(optimizer, name):
            setattr(sgd, name, getattr(optimizer, name))
    return sgd


def learning_rate_schedule(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.schedules.LearningRateSchedule | None:
    """Returns the learning rate of an optimizer if it is a schedule."""
    rate = optimizer._learning_rate  # The public name has its present value.
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return rate if isinstance(rate, schedule) else None


def variables_of(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Returns the variables for which a Keras optimizer was built."""
    return list(optimizer._trainable_variables)


def replace_optimizer(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> None:
    """Replaces the optimizer of a compiled model, also where it is saved.

    Keras saves what `compile` was given. To call `compile` again would lose the
    state of metrics, and a model may have a `compile` of its own.
    """
    model.optimizer = optimizer
    model._compile_config.config["optimizer"] = optimizer
    model.train_function = None  # It has traced the former optimizer.


def divide_by_no_zeros(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes Keras's Adafactor take gradients of which most entries are zero.

    Adafactor divides each entry by the root of v = r c / mean(r), in which r
    and c are the means of the squares in its row and in its column. Where all
    of both are 0, v underflows, and 0 / 0 is NaN. Adafactor stores v by the
    public `assign` before it divides, so that a tiny number can take the place
    of 0. Nothing else changes, to the bit.

    The optimizer must be built already, as for `take_aggregated_gradients`.
    """
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        if isinstance(part, keras.optimizers.Adafactor):
            part.assign = functools.partial(_assign_no_zeros, part.assign)


def _assign_no_zeros(
    assign: Callable[[keras.Variable, tf.Tensor], None],
    variable: keras.Variable,
    value: tf.Tensor | tf.IndexedSlices,
) -> None:
    """Calls `assign` with a tiny number in the place of zeros."""
    if not isinstance(value, tf.IndexedSlices):
        # The smallest normal number, because others may be taken for 0.
        tiny = 2.0 ** (-14 if value.dtype == tf.float16 else -126)
        value = tf.where(tf.equal(value, 0), tf.cast(tiny, value.dtype), value)
    assign(variable, value)


def give_back(optimizer: keras.optimizers.Optimizer) -> None:
    """Undoes what the functions above have changed in an optimizer."""
    for part in (optimizer, *getattr(optimizer, "optimizers", ())):
        for name in ("_all_reduce_sum_gradients", "_clip_gradients", "assign"):
            if name in vars(part):
                delattr(part, name)


def strategy_of(
    optimizer: keras.optimizers.Optimizer,
) -> tf.distribute.Strategy:
    """Returns the strategy in whose scope a Keras optimizer was created."""
    return optimizer._distribution_strategy
