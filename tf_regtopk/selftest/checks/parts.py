"""The parts that the checks try, and a case of a check."""

from collections.abc import Callable
from typing import Any
from typing import Literal

import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.trial import Trial

# A case of a check: its name, and the function that runs it.
Case = tuple[str, Callable[[], str | None]]
# A comparison: the name, the actual and the expected array, and of what it is.
Expect = Callable[[str, np.ndarray, np.ndarray, str], None]

DENSITY = 0.01
# The second of the two variables is exchanged densely with these arguments.
SOME_DENSE: dict[str, Any] = {"dense_below": 2000}

SPARSIFIERS = {
    "RegTopK": tf_regtopk.RegTopK(DENSITY),
    'RegTopK(denominator="current")': tf_regtopk.RegTopK(
        DENSITY, denominator="current"
    ),
    "TopK": tf_regtopk.TopK(DENSITY),
    "RandomK": tf_regtopk.RandomK(DENSITY),
    "Dense": tf_regtopk.Dense(),
}
# The codecs are in pairs, without the index codec and value codec of `Codec()`.
CODECS: tuple[
    tuple[
        Literal["int32", "elias_fano", "golomb", "bitmap"],
        Literal["bfloat16", "float16", "natural", "uniform", "sign", "ternary"],
    ],
    ...,
] = (
    ("int32", "bfloat16"),
    ("elias_fano", "float16"),
    ("golomb", "natural"),
    ("bitmap", "uniform"),
    ("elias_fano", "sign"),
    ("golomb", "ternary"),
)
# The default rule `Accumulate()` is left out, because other checks have it.
RULES = {
    "Accumulate(momentum, factor_masking)": tf_regtopk.Accumulate(
        momentum=0.5, factor_masking=True
    ),
    "NoFeedback": tf_regtopk.NoFeedback(),
    "EF21": tf_regtopk.EF21(),
    "EF21(momentum)": tf_regtopk.EF21(momentum=0.5),
    "LearnedShift": tf_regtopk.LearnedShift(),
    "LearnedShift(momentum)": tf_regtopk.LearnedShift(momentum=0.5),
    "LearnedShift(at_once)": tf_regtopk.LearnedShift(
        momentum=0.5, at_once=True
    ),
    "LocalAdam": tf_regtopk.LocalAdam(tf_regtopk.LearnedShift()),
    "CompressedDownlink": tf_regtopk.CompressedDownlink(),
}


def run_case(strategy: tf.distribute.Strategy, **kwargs: Any) -> None:
    """Takes steps, and checks that all rules hold."""
    trial = Trial(strategy, **kwargs)
    gradients = trial_lib.make_gradients(strategy.num_replicas_in_sync)
    weights = trial_lib.run(trial, gradients)
    trial_lib.expect_balance(trial, gradients, weights)
    trial_lib.expect_sparse(trial, weights)
