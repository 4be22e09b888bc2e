"""Saved states of small replicas."""

import numpy as np

from tf_regtopk.saving import saved_state


def state(replicas, num_replicas=3, step=1):
    return saved_state.SavedState(
        {"scope": "global"},
        {"step": step},
        num_replicas,
        {n: [np.full(2, n, "float32"), np.arange(3)] for n in replicas},
        [np.arange(4.0)],
    )


def accumulated_state(replicas, num_devices=1):
    """Each device of the replica n has n + 1."""
    saved = state(replicas)
    return saved._replace(
        moment={**saved.moment, "accumulated": [1, 4]},
        accumulated={
            n: [[np.full(2, n + 1, "float32")]] * num_devices for n in replicas
        },
    )
