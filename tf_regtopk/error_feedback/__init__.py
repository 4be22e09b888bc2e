r"""Error feedback: what becomes of the gradient that was not sent.

Each rule is a few equations for one replica n of N, in which g is its gradient,
a what entries are selected from, and `sent` what the others receive of a:

    a, ...        = accumulate(state, g)        before anything is sent
    state         = update(state, a, sent, total)
    aggregate     = aggregate(shared, total)    total: the sum of all `sent`

Under `tf.distribute` Keras divides the loss by the number of replicas, so g
already carries the weight 1/N, and the sum over the replicas is the mean of
their gradients.
"""

from tf_regtopk.error_feedback.adam_of_sum import AdamOfSum
from tf_regtopk.error_feedback.base import ErrorFeedback
from tf_regtopk.error_feedback.base import Progress
from tf_regtopk.error_feedback.base import StepContext
from tf_regtopk.error_feedback.downlink import CompressedDownlink
from tf_regtopk.error_feedback.ef21 import EF21
from tf_regtopk.error_feedback.error_accumulation import Accumulate
from tf_regtopk.error_feedback.learned_shift import LearnedShift
from tf_regtopk.error_feedback.local_adam import LocalAdam
from tf_regtopk.error_feedback.momentum_of_sum import MomentumOfSum
from tf_regtopk.error_feedback.no_feedback import NoFeedback

__all__ = [
    "EF21",
    "Accumulate",
    "AdamOfSum",
    "CompressedDownlink",
    "ErrorFeedback",
    "LearnedShift",
    "LocalAdam",
    "MomentumOfSum",
    "NoFeedback",
    "Progress",
    "StepContext",
]
