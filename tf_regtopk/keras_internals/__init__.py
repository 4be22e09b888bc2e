"""The private parts of Keras and TensorFlow that this package relies on.

Members that Keras's own optimizers use of their base class do not count.
Nothing public serves in place of these parts; each part has a test that fails
when upstream changes it.
"""

from tf_regtopk.keras_internals.checkpoints import CHECKPOINT_KEY
from tf_regtopk.keras_internals.checkpoints import CHECKPOINT_KEYS
from tf_regtopk.keras_internals.checkpoints import CheckpointedAsInner
from tf_regtopk.keras_internals.collective_keys import keep_collectives_apart
from tf_regtopk.keras_internals.collective_keys import (
    let_collectives_run_in_loops,
)
from tf_regtopk.keras_internals.collectives import abort_collectives
from tf_regtopk.keras_internals.collectives import can_exchange_at_once
from tf_regtopk.keras_internals.collectives import can_gather_at_once
from tf_regtopk.keras_internals.collectives import exchange_among_workers
from tf_regtopk.keras_internals.collectives import exchange_at_once
from tf_regtopk.keras_internals.collectives import gather_among_workers
from tf_regtopk.keras_internals.collectives import gather_at_once
from tf_regtopk.keras_internals.collectives import gathers_fixed_lengths
from tf_regtopk.keras_internals.collectives import sum_within_worker
from tf_regtopk.keras_internals.execution import in_xla_context
from tf_regtopk.keras_internals.execution import initial_values_of_each_worker
from tf_regtopk.keras_internals.execution import is_op_determinism_enabled
from tf_regtopk.keras_internals.neighbours import exchange_in_group
from tf_regtopk.keras_internals.neighbours import group_keys
from tf_regtopk.keras_internals.neighbours import Link
from tf_regtopk.keras_internals.neighbours import pass_on
from tf_regtopk.keras_internals.neighbours import take_instance_keys
from tf_regtopk.keras_internals.optimizers import apply_aggregated
from tf_regtopk.keras_internals.optimizers import divide_by_no_zeros
from tf_regtopk.keras_internals.optimizers import give_back
from tf_regtopk.keras_internals.optimizers import learning_rate_schedule
from tf_regtopk.keras_internals.optimizers import replace_optimizer
from tf_regtopk.keras_internals.optimizers import sgd_like
from tf_regtopk.keras_internals.optimizers import strategy_of
from tf_regtopk.keras_internals.optimizers import take_aggregated_gradients
from tf_regtopk.keras_internals.optimizers import take_clipping
from tf_regtopk.keras_internals.optimizers import variables_of
from tf_regtopk.keras_internals.upstream import check_upstream

__all__ = [
    "CHECKPOINT_KEY",
    "CHECKPOINT_KEYS",
    "CheckpointedAsInner",
    "Link",
    "abort_collectives",
    "apply_aggregated",
    "can_exchange_at_once",
    "can_gather_at_once",
    "check_upstream",
    "divide_by_no_zeros",
    "exchange_among_workers",
    "exchange_at_once",
    "exchange_in_group",
    "gather_among_workers",
    "gather_at_once",
    "gathers_fixed_lengths",
    "give_back",
    "group_keys",
    "in_xla_context",
    "initial_values_of_each_worker",
    "is_op_determinism_enabled",
    "keep_collectives_apart",
    "learning_rate_schedule",
    "let_collectives_run_in_loops",
    "pass_on",
    "replace_optimizer",
    "sgd_like",
    "strategy_of",
    "sum_within_worker",
    "take_aggregated_gradients",
    "take_clipping",
    "take_instance_keys",
    "variables_of",
]
