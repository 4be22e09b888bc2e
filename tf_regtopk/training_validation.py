"""Checks of what training works with: optimizers, strategies and tensors."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

_SUPPORTED_STRATEGIES = {
    "OneDeviceStrategy": tf.distribute.OneDeviceStrategy,
    "MirroredStrategy": tf.distribute.MirroredStrategy,
    "MultiWorkerMirroredStrategy": tf.distribute.MultiWorkerMirroredStrategy,
}

# Keras's base class takes these arguments, and an inner optimizer may have been
# given them. The wrapper hands the first two on when they are set later.
_DELEGATED = ("learning_rate", "loss_scale_factor")
_BASE_ARGUMENTS = (
    *_DELEGATED,
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
)
# Arguments that users look for here, and whose they are.
_BELONGS_TO = {
    "density": "It is one of the sparsifier, as in `TopK(density=0.01)`. ",
    "momentum": "It is one of `error_feedback`, as in "
    "`Accumulate(momentum=0.9)`, or of the inner optimizer. ",
}


def check_keras() -> None:
    """Raises unless Keras is new enough, on the TensorFlow backend."""
    numbers = keras.__version__.split(".")[:2]
    if tuple(int(number) for number in numbers) < (3, 10):
        raise ValueError(
            "`keras` must be version 3.10 or newer, because older versions "
            "report wrong losses and metrics under a strategy, and those "
            "before 3.8 take steps as many times too large as there are "
            'replicas. Install it by `pip install "keras>=3.10"`. '
            f"Received: keras.__version__={keras.__version__!r}"
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "The Keras backend must be TensorFlow (set "
            'KERAS_BACKEND="tensorflow"). '
            f"Received: keras.backend.backend()={keras.backend.backend()!r}"
        )


def check_strategy() -> None:
    """Raises unless entries can be exchanged under the strategy in scope."""
    strategy = tf.distribute.get_strategy()
    if tf.distribute.has_strategy() and not isinstance(
        strategy, tuple(_SUPPORTED_STRATEGIES.values())
    ):
        raise ValueError(
            "The strategy in scope must be one of "
            f"{', '.join(_SUPPORTED_STRATEGIES)}, or none. "
            f"Received: {type(strategy).__name__}"
        )


def check_in_scope_of(name: str, strategy: tf.distribute.Strategy) -> None:
    """Raises unless the object `name` belongs to the strategy in scope."""
    in_scope = tf.distribute.get_strategy()
    if strategy is not in_scope:
        raise ValueError(
            f"`{name}` must be created in the scope of the strategy that it "
            f"trains under. Received: {name} made under "
            f"{_describe(strategy)}, used under {_describe(in_scope)}. Create "
            "and compile the model inside `with strategy.scope():`"
        )


def _describe(strategy: tf.distribute.Strategy) -> str:
    name = type(strategy).__name__
    return "no strategy" if name.startswith("_") else f"a {name}"


def check_loss_scaling(is_scaled_locally: bool) -> None:
    """Raises if the scale would depend on which replica overflows."""
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if is_scaled_locally and num_replicas > 1:
        raise ValueError(
            "With several replicas the loss must be scaled by a "
            "`tf_regtopk.LossScaleOptimizer` around `SparsifiedOptimizer`: "
            "Keras's own, which `compile` adds under `mixed_float16`, looks at "
            "the gradients of one replica only. Received: a "
            f"`keras.optimizers.LossScaleOptimizer` on {num_replicas} replicas"
        )


def check_inner_optimizer(inner_optimizer: Any, wrapper_class: type) -> None:
    """Raises unless `inner_optimizer` is an optimizer that can be wrapped."""
    received = f"Received: inner_optimizer={inner_optimizer!r}"
    if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a `keras.optimizers.Optimizer`. "
            + received
        )
    if isinstance(inner_optimizer, wrapper_class):
        raise ValueError(
            "`inner_optimizer` must not be a "
            f"`{type(inner_optimizer).__name__}` itself. {received}"
        )
    if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`inner_optimizer` must not be a `LossScaleOptimizer`. Put that "
            f"around the wrapper instead. {received}"
        )
    check_no_accumulation(inner_optimizer)


def check_no_accumulation(inner_optimizer: keras.optimizers.Optimizer) -> None:
    """Raises if the inner optimizer, or a part of it, accumulates gradients."""
    parts = (inner_optimizer, *getattr(inner_optimizer, "optimizers", ()))
    for steps in (part.gradient_accumulation_steps for part in parts):
        if steps:
            raise ValueError(
                "`inner_optimizer` must have no `gradient_accumulation_steps`: "
                f"pass `accumulation_steps={steps}` to the wrapper, which "
                "accumulates before anything is sent. Received: "
                f"gradient_accumulation_steps={steps}"
            )


def check_no_parts(inner_optimizer: keras.optimizers.Optimizer) -> None:
    """Raises if the inner optimizer consists of others, which clip."""
    if hasattr(inner_optimizer, "optimizers"):
        raise ValueError(
            '`clipping="replica"` must go with an inner optimizer that has no '
            "parts, because each part has a clipping of its own: leave "
            f"`clipping` out. Received: inner_optimizer={inner_optimizer!r}"
        )


def check_no_base_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises if arguments that belong on the inner optimizer were given."""
    for name, value in arguments.items():
        if name not in _BASE_ARGUMENTS:
            advice = _BELONGS_TO.get(name, "")
            raise TypeError(
                f"Unknown argument `{name}`. {advice}Received: {name}={value!r}"
            )
        _refuse_base_setting(name, value)


def check_no_base_setting(name: str, value: Any) -> None:
    """Raises if an attribute that belongs on the inner optimizer is set."""
    if name in _BASE_ARGUMENTS and name not in _DELEGATED:
        _refuse_base_setting(name, value)


def _refuse_base_setting(name: str, value: Any) -> None:
    if name == "gradient_accumulation_steps":
        raise ValueError(
            "`gradient_accumulation_steps` must be `accumulation_steps` of the "
            f"wrapper. Received: {name}={value!r}"
        )
    raise ValueError(
        f"`{name}` must be set on the `inner_optimizer`, not on the "
        f"wrapper. Received: {name}={value!r}"
    )


def check_loaded_shapes(
    variables: Sequence[Any], values: Sequence[Any]
) -> None:
    """Raises unless the variables of an optimizer can take saved values."""
    check_shapes(
        "The saved optimizer",
        variables,
        values,
        ". (Give the learning rate as it was, a number or a schedule, and the "
        "momentum and `use_ema`. If layers were frozen or unfrozen before it "
        "was saved, load with them as they were when the optimizer was built, "
        "or, without what it keeps, with `compile=False`)",
    )


def check_shapes(
    name: str, variables: Sequence[Any], values: Sequence[Any], advice: str = ""
) -> None:
    """Raises unless the values have the shapes of the variables."""
    expected = [tuple(variable.shape) for variable in variables]
    received = [tuple(value.shape) for value in values]
    if expected != received:
        raise ValueError(
            f"{name} must have variables of the shapes {expected}. "
            f"Received: {received}{advice}"
        )


def check_gradient_shapes(
    gradients: Sequence[Any], variables: Sequence[Any]
) -> None:
    """Raises unless each gradient that there is has its variable's shape."""
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is None:
            continue
        shape = tf.TensorShape(gradient.shape)
        if not shape.is_compatible_with(tuple(variable.shape)):
            raise ValueError(
                "`grads` must have the shapes of their variables. Received: a "
                f"gradient of shape {shape} for `{variable.name}` of shape "
                f"{tuple(variable.shape)}"
            )


def check_scores(scores: tf.Tensor, accumulated: tf.Tensor) -> None:
    """Raises unless a sparsifier's scores fit the accumulated gradient."""
    if scores.shape != accumulated.shape or scores.dtype != accumulated.dtype:
        raise ValueError(
            "`score` of the sparsifier must return a tensor of shape "
            f"{accumulated.shape} and dtype {accumulated.dtype.name}. "
            f"Received: shape={scores.shape}, dtype={scores.dtype.name}"
        )


def check_local_state(
    method: str,
    returned: Sequence[tf.Tensor | None],
    before: Sequence[tf.Tensor],
) -> None:
    """Raises unless a rule of error feedback returns all its local tensors.

    Args:
        method: Name of the class and its method.
        returned: Tuple of the tensors that the method has returned.
        before: Tuple of the tensors that the method was given.
    """
    fits = len(returned) == len(before) and all(
        new is not None and new.shape == old.shape and new.dtype == old.dtype
        for new, old in zip(returned, before, strict=True)
    )
    if not fits:
        described = [
            None if new is None else f"{new.dtype.name}{new.shape}"
            for new in returned
        ]
        former = ""
        if any(new is None for new in returned):
            former = (
                " (None and `keeps_a` served for that in version 0.1.0: return "
                "`local[i]`, and a itself)"
            )
        raise ValueError(
            f"`{method}` must return a tensor for each local one, {len(before)}"
            " in all, of its shape and dtype, and the same object where one "
            f"stays as it is{former}. Received: {described}"
        )


def check_memory(
    method: str, returned: Sequence[tf.Tensor], before: Sequence[tf.Tensor]
) -> None:
    """Raises unless a sparsifier returns a memory like that of before.

    Args:
        method: Name of the class and its method.
        returned: Tuple of the tensors that the method has returned.
        before: Tuple of the tensors of `initial_memory`.
    """

    def describe(tensors: Sequence[tf.Tensor]) -> list[str]:
        return [f"{tensor.dtype.name}{tensor.shape}" for tensor in tensors]

    if describe(returned) != describe(before):
        raise ValueError(
            f"`{method}` must return tensors of the shapes and dtypes of "
            f"`initial_memory`, {describe(before)}. "
            f"Received: {describe(returned)}"
        )


def check_words(method: str, words: tf.Tensor, num_words: int) -> None:
    """Raises unless a codec has written as many words as it says.

    Args:
        method: Name of the class and its method.
        words: Tensor that the method has returned.
        num_words: What `num_words` of the class says.
    """
    if words.dtype != tf.uint32 or not words.shape.is_compatible_with(
        [num_words]
    ):
        raise ValueError(
            f"`{method}` must return a uint32 tensor of as many words as "
            f"`num_words` says, {num_words}. "
            f"Received: dtype={words.dtype.name}, shape={words.shape}"
        )


def check_values(
    method: str, values: tf.Tensor, k: int, dtype: tf.DType
) -> None:
    """Raises unless a codec has decoded k values of a dtype."""
    if values.dtype != dtype or not values.shape.is_compatible_with([k]):
        raise ValueError(
            f"`{method}` must return a tensor of shape ({k},) and dtype "
            f"{dtype.name}. "
            f"Received: shape={values.shape}, dtype={values.dtype.name}"
        )


def check_replica_context() -> None:
    """Raises unless the call is in a replica context, with its gradients."""
    if tf.distribute.in_cross_replica_context():
        raise ValueError(
            "`apply` must be called in a replica context, that is inside "
            "`strategy.run`. Received: a call in cross-replica context"
        )


def check_not_compiled_as_a_whole(is_compiled: bool) -> None:
    """Raises if XLA is to compile the whole step under a strategy."""
    if is_compiled and tf.distribute.has_strategy():
        raise ValueError(
            "`jit_compile` must be False under a strategy: XLA compiles no "
            "collectives. (The wrapper compiles its own part.) "
            "Received: jit_compile=True"
        )


def variables_needed() -> ValueError:
    """The error of a step of an optimizer that cannot know its variables."""
    return ValueError(
        "`trainable_variables` must be given until the optimizer is built. "
        "Received: trainable_variables=None"
    )


def check_built(optimizer: keras.optimizers.Optimizer, method: str) -> None:
    """Raises unless the optimizer has its variables."""
    if not optimizer.built:
        raise ValueError(
            f"The optimizer must be built before `{method}`. Call "
            "`optimizer.build(model.trainable_variables)`."
        )
