"""Checks of the arguments of `DecentralizedOptimizer`."""

from collections.abc import Mapping
from typing import Any
import warnings

import numpy as np
import tensorflow as tf

from tf_regtopk import codecs
from tf_regtopk import error_feedback as error_feedback_lib
from tf_regtopk import sparsifiers
from tf_regtopk import training_validation
from tf_regtopk import validation
from tf_regtopk.distribute import mixing
from tf_regtopk.distribute import mixing_rules
from tf_regtopk.distribute import neighbours
from tf_regtopk.optimizers import layer_mask as layer_mask_lib
from tf_regtopk.steps import cross_gradients as cross_gradients_lib

_RULES = (
    error_feedback_lib.NoFeedback(),
    error_feedback_lib.EF21(),
    error_feedback_lib.Accumulate(),
)
# With `CrossGradients` neighbours have to know each other's weights.
_WITH_CROSS_GRADIENTS = {
    "sparsifier": sparsifiers.Dense(),
    "codec": codecs.Codec(),
    "error_feedback": error_feedback_lib.NoFeedback(),
    "mixing_rule": mixing_rules.LinearGossip(),
    "communication_period": 1,
    "layer_mask": None,
}


def check_no_base_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises if arguments that belong elsewhere were given."""
    if "accumulation_steps" in arguments:
        raise ValueError(
            "`accumulation_steps` must be `communication_period`: between two "
            "exchanges each replica takes steps of its own. Received: "
            f"accumulation_steps={arguments['accumulation_steps']!r}"
        )
    training_validation.check_no_base_arguments(arguments)


def check_inner_optimizer(inner_optimizer: Any) -> None:
    """Raises if the inner optimizer has what replicas must have in common."""
    parts = (inner_optimizer, *getattr(inner_optimizer, "optimizers", ()))
    for part in parts:
        if getattr(part, "gradient_accumulation_steps", None):
            raise ValueError(
                "`inner_optimizer` must have no `gradient_accumulation_steps`: "
                "between two exchanges each replica takes steps of its own, as "
                "many as `communication_period` says. Received: "
                "gradient_accumulation_steps="
                f"{part.gradient_accumulation_steps}"
            )
        if getattr(part, "use_ema", False):
            raise ValueError(
                "`inner_optimizer` must have no `use_ema`, because Keras would "
                "give all replicas the moving average of the first one. "
                "Received: use_ema=True"
            )


def check_parts(
    topology: Any, sparsifier: Any, codec: Any, error_feedback: Any
) -> None:
    """Raises unless all parts are of the right type and go together."""
    validation.check_instance(
        "topology", topology, mixing.MixingTopology, "Ring()"
    )
    validation.check_instance(
        "sparsifier", sparsifier, sparsifiers.Sparsifier, "TopK(density=0.1)"
    )
    validation.check_instance(
        "codec", codec, codecs.Codec, 'Codec(values="uniform")'
    )
    validation.check_instance(
        "error_feedback",
        error_feedback,
        error_feedback_lib.ErrorFeedback,
        "EF21()",
    )
    if error_feedback not in _RULES:
        raise ValueError(
            "`error_feedback` must be `NoFeedback()`, `EF21()` or "
            "`Accumulate()` with their defaults, because other rules are for "
            "gradients, and here replicas send weights. Received: "
            f"error_feedback={error_feedback!r}"
        )
    if sparsifier.initial_memory(1, 2, tf.float32):
        raise ValueError(
            "`sparsifier` must be one that remembers nothing, such as `TopK`, "
            "because replicas get no sum to remember. Received: "
            f"sparsifier={sparsifier!r}"
        )
    if codec.payload(k=1, size=2).is_variable:
        raise ValueError(
            "`codec` must write indices in a fixed length, which neighbours "
            'know, as `Codec(indices="auto")` does. '
            f"Received: indices={codec.indices!r}"
        )
    if error_feedback == error_feedback_lib.NoFeedback() and not _sends_all(
        sparsifier, codec
    ):
        warnings.warn(
            "Replicas that send some of their weights, or round them, should "
            "have `error_feedback=Accumulate()` or `EF21()`: without it they "
            f"never agree. Received: {sparsifier=}, {codec=}, "
            f"{error_feedback=}",
            stacklevel=3,
        )


def check_mixing_rule(
    mixing_rule: Any,
    sparsifier: sparsifiers.Sparsifier,
    codec: codecs.Codec,
    error_feedback: error_feedback_lib.ErrorFeedback,
) -> None:
    """Raises unless the rule of mixing gets what it needs."""
    validation.check_instance(
        "mixing_rule",
        mixing_rule,
        mixing_rules.MixingRule,
        "NonlinearGossip(alpha=0.75)",
    )
    if mixing_rule.compares_weights and not (
        _sends_all(sparsifier, codec)
        and error_feedback == error_feedback_lib.NoFeedback()
    ):
        raise ValueError(
            f"`mixing_rule={mixing_rule!r}` must go with `Dense()`, a codec "
            "that rounds nothing and `NoFeedback()`, because it compares the "
            "weights of neighbours, entry by entry. Use `LinearGossip()` for "
            f"others. Received: {sparsifier=}, {codec=}, {error_feedback=}"
        )


def check_symmetric(
    topology: mixing.MixingTopology,
    mixing_rule: mixing_rules.MixingRule,
    num_replicas: int,
) -> None:
    """Raises if a rule that needs mutual neighbours is to go without."""
    if not mixing_rule.compares_weights:
        return
    matrices = topology.mixing_matrices(num_replicas)
    if not np.allclose(matrices, np.swapaxes(matrices, 1, 2)):
        raise ValueError(
            f"`mixing_rule={mixing_rule!r}` must go with a topology whose "
            "mixing matrices are symmetric, such as `Ring()`, because the mean "
            "of all replicas would change. Received: "
            f"topology={topology!r}"
        )


def _sends_all(sparsifier: sparsifiers.Sparsifier, codec: codecs.Codec) -> bool:
    """Returns whether neighbours receive the weights as they are."""
    values = codec.payload(k=1, size=2).values
    return isinstance(sparsifier, sparsifiers.Dense) and isinstance(
        values, codecs.Float32
    )


def check_tracks(mixing_rule: mixing_rules.MixingRule) -> None:
    """Raises unless the replicas track their mean."""
    if not mixing_rule.tracks_average:
        raise ValueError(
            "`DecentralizedOptimizer` must have `mixing_rule=AverageTracker()` "
            "to know of the mean of the replicas; `averaged` finds it by an "
            f"all-reduce. Received: mixing_rule={mixing_rule!r}"
        )


def check_constant(
    topology: mixing.MixingTopology,
    error_feedback: error_feedback_lib.ErrorFeedback,
    num_replicas: int,
) -> None:
    """Raises if `EF21` is to follow neighbours that change."""
    num_steps = len(neighbours.rounds_of(topology, num_replicas))
    if isinstance(error_feedback, error_feedback_lib.EF21) and num_steps > 1:
        raise ValueError(
            "`error_feedback=EF21()` must go with a topology that is the same "
            "in all steps, such as `Ring()`, because it adds up what the same "
            "neighbours have sent. Use `Accumulate()` for others. Received: "
            f"topology={topology!r}, of {num_steps} different steps"
        )


def check_layer_mask(layer_mask: Any) -> None:
    """Raises unless it is None or a `LayerMask`."""
    if layer_mask is not None:
        validation.check_instance(
            "layer_mask",
            layer_mask,
            layer_mask_lib.LayerMask,
            'LayerMask([["dense"], []])',
        )


def check_cross_gradients(cross_gradients: Any, **exchange: Any) -> None:
    """Raises unless all weights are exchanged in each step, as they are.

    Args:
        cross_gradients: `CrossGradients`, or None, for which nothing has to
            hold.
        **exchange: Arguments of the optimizer that have their types already.
    """
    if cross_gradients is None:
        return
    validation.check_instance(
        "cross_gradients",
        cross_gradients,
        cross_gradients_lib.CrossGradients,
        "CrossGradients(alpha=1.0)",
    )
    wrong = {
        name: value
        for name, value in exchange.items()
        if value != _WITH_CROSS_GRADIENTS[name]
    }
    if wrong:
        needed = ", ".join(
            f"`{name}={_WITH_CROSS_GRADIENTS[name]!r}`" for name in wrong
        )
        raise ValueError(
            f"`cross_gradients` must go with {needed}, because gradients are "
            "taken at the weights that neighbours send, in each step: leave "
            f"the default, or leave out `cross_gradients`. Received: {wrong}"
        )


def check_knows_loss(
    cross_gradients: cross_gradients_lib.CrossGradients | None,
    is_known: bool,
) -> None:
    """Raises if the loss at other weights is needed and not known."""
    if cross_gradients is not None and not is_known:
        raise ValueError(
            "`cross_gradients` must go with a model that knows its loss at the "
            "weights of neighbours: derive its class from "
            "`CrossGradientTraining` first, as in `class "
            "Network(tf_regtopk.CrossGradientTraining, keras.Model)`. (In a "
            "training loop of your own use `optimizer.with_gradients_at`.) "
            f"Received: cross_gradients={cross_gradients!r} in another step"
        )


def check_no_gradient_groups(
    topology: mixing.MixingTopology, num_replicas: int, **arguments: Any
) -> None:
    """Raises if gradients are averaged that must not be.

    Args:
        topology: `MixingTopology`.
        num_replicas: N.
        **arguments: Arguments of the optimizer that forbid it, or None.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given and topology.gradient_groups(num_replicas):
        raise ValueError(
            f"`{given[0]}` must go with a topology that averages weights only, "
            "because each replica has a gradient of its own, which leaves out "
            "layers or heeds other replicas. Received: "
            f"topology={topology!r}"
        )


def check_no_loss_scaling(optimizer: Any) -> None:
    """Raises if the loss is scaled, by a scale that replicas have in common."""
    if optimizer.expects_skips or optimizer.is_scaled_locally:
        raise ValueError(
            "`DecentralizedOptimizer` must go without a `LossScaleOptimizer` "
            "(which `compile` adds under `mixed_float16`), because no replica "
            "hears of an overflow on all others: use `mixed_bfloat16` or "
            "float32. Received: a scaled loss"
        )


def cannot_checkpoint() -> ValueError:
    """The error of a checkpoint, whose variables have one value each."""
    return ValueError(
        "`tf.train.Checkpoint` cannot save what each replica of a "
        "`DecentralizedOptimizer` keeps. Train with `tf_regtopk.Backup` to "
        "resume, or save the model in `with tf_regtopk.averaged(model):` by "
        "`model.save`. Received: several replicas"
    )
