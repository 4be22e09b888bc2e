"""Checks of several workers on this machine."""

from collections.abc import Iterator
import functools

from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest import workers as workers_lib
from tf_regtopk.selftest.checks import parts


def workers(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that two workers on this machine agree."""
    for communication in ("AUTO", "NCCL"):
        if communication == "AUTO" or devices.kind == "GPU":
            yield (
                communication,
                functools.partial(
                    workers_lib.workers_agree, devices, communication
                ),
            )


def lost_worker(devices: trial_lib.Devices) -> Iterator[parts.Case]:
    """Checks that a worker terminates after the other one is killed."""
    yield (
        "SIGKILL",
        functools.partial(workers_lib.lost_worker_ends_the_other, devices),
    )
