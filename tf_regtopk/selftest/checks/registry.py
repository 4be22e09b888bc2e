"""All checks, by their names."""

from collections.abc import Callable
from collections.abc import Iterator

from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import agreement
from tf_regtopk.selftest.checks import keras_training
from tf_regtopk.selftest.checks import machine
from tf_regtopk.selftest.checks import owners
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.checks import several_workers
from tf_regtopk.selftest.checks import speed
from tf_regtopk.selftest.checks import step

# The checks are in the order of the table.
CHECKS: dict[str, Callable[[trial_lib.Devices], Iterator[parts.Case]]] = {
    check.__name__: check
    for check in (
        machine.environment,
        step.one_device,
        step.sparsifiers,
        step.codecs,
        step.error_feedback,
        step.options,
        owners.reduce_scatter,
        agreement.placement,
        agreement.same_as_cpu,
        agreement.repeatable,
        agreement.non_finite,
        keras_training.loss_scale,
        keras_training.saving,
        keras_training.fit,
        keras_training.fit_dense,
        keras_training.fit_conv,
        several_workers.workers,
        several_workers.lost_worker,
        speed.speed,
    )
}
# Nothing else runs during these checks, because that would distort their times.
ALONE = frozenset({"speed"})
# These checks start several processes.
OF_WORKERS = frozenset({"workers", "lost_worker"})
QUICK = (
    "environment",
    "one_device",
    "sparsifiers",
    "codecs",
    "error_feedback",
    "placement",
    "non_finite",
    "saving",
    "fit",
)
