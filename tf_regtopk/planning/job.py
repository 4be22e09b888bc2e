"""The training whose steps are predicted, in numbers."""

import dataclasses

from tf_regtopk import validation
from tf_regtopk.planning import devices
from tf_regtopk.planning import network as network_lib
from tf_regtopk.sizes import selected
from tf_regtopk.sizes import values as value_sizes

FLOAT_BYTES = 4
# A pass over the gradient reads two floats per parameter and writes one float.
PASS_BYTES = 3 * FLOAT_BYTES


@dataclasses.dataclass(frozen=True)
class Job:
    """A training: its model, its workers and its compression.

    Args:
        parameters: J, the number of parameters of the model.
        workers: N, hosts with a link each. With 1 its devices exchange.
        step_seconds: Seconds of a step's computing, without any exchange.
        device: `devices.Device`, which computes and processes.
        density: k / J.
        values: Name of the value codec, see `Codec`.
        devices_per_worker: D.
        overlap: Share in [0, 1] of a dense exchange that the backward pass can
            hide. A sparse exchange has to wait for all gradients.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument breaks its rule.
    """

    parameters: int
    workers: int
    step_seconds: float
    device: devices.Device
    density: float = 0.001
    values: value_sizes.ValueCodecName = "float32"
    devices_per_worker: int = 1
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (
            ("parameters", 1),
            ("workers", 1),
            ("devices_per_worker", 1),
        ):
            validation.check_integer(name, getattr(self, name), least)
        if self.num_devices == 1:
            raise ValueError(
                "`devices_per_worker` must be at least 2 with one worker, "
                "because a single device exchanges nothing. Received: "
                "workers=1, devices_per_worker=1"
            )
        validation.check_number(
            "parameters",
            self.parameters,
            "below 2^31 (2.1 billion), the most that indices of 32 bits reach",
            lambda parameters: parameters < 2**31,
        )
        network_lib.check_time("step_seconds", self.step_seconds)
        validation.check_instance(
            "device", self.device, devices.Device, 'devices.DEVICES["a100"]'
        )
        validation.check_number(
            "overlap", self.overlap, "in [0, 1]", lambda share: 0 <= share <= 1
        )
        validation.check_choice("values", self.values, tuple(value_sizes.CODES))
        validation.check_density("density", self.density)

    @property
    def num_devices(self) -> int:
        """Number of devices of all workers."""
        return self.workers * self.devices_per_worker

    @property
    def num_selected(self) -> int:
        """Number k of selected entries."""
        return selected.num_selected(float(self.density), self.parameters)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the whole gradient."""
        return FLOAT_BYTES * self.parameters

    @property
    def pass_seconds(self) -> float:
        """Seconds F of a pass over the gradient."""
        return PASS_BYTES * self.parameters / self.device.memory_bandwidth


def members(job: Job) -> Job:
    """Returns the job in which the devices of a single worker are the workers.

    Args:
        job: `Job`.

    Returns:
        `Job` of at least 2 workers.

    Example:

    >>> gpu = devices.DEVICES["a100"]
    >>> host = Job(10**7, 1, 0.2, gpu, devices_per_worker=8)
    >>> members(host).workers
    8
    """
    if job.workers > 1:
        return job
    return dataclasses.replace(
        job, workers=job.devices_per_worker, devices_per_worker=1
    )
