"""The cluster: names and addresses of all workers, and how others tell them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import socket
import time
from typing import Any

# The environment variable with the secret of launchers that meet.
SECRET_VARIABLE = "TF_REGTOPK_SECRET"

# Ports of a Slurm job: those of `--port`, or of the job's number. Jobs may
# share a host, so each has 20 of its own.
_SLURM_PORTS, _PORTS_A_JOB = 12000, 20


@dataclasses.dataclass(frozen=True)
class Place:
    """A worker's place in the cluster, and its share of the machine.

    Args:
        name: Name of the worker, such as "worker 1".
        number: Number of the worker among all.
        addresses: Dict from the names of all workers to "host:port". The first
            is the chief.
        gpus: Names of its GPUs; none to run on the CPU, None for those that
            the launcher sees.
        cores: Numbers of its cores; none for all that the launcher has.
    """

    name: str
    number: int
    addresses: Mapping[str, str]
    gpus: tuple[str, ...] | None = None
    cores: tuple[int, ...] = ()

    @property
    def tf_config(self) -> str:
        """The value of `TF_CONFIG`."""
        cluster: dict[str, list[str]] = {}
        for name, address in self.addresses.items():
            cluster.setdefault(name.split()[0], []).append(address)
        job, index = self.name.split()
        task = {"type": job, "index": int(index)}
        return json.dumps({"cluster": cluster, "task": task})

    @property
    def peers(self) -> dict[str, str]:
        """The names and addresses of the other workers."""
        return {k: v for k, v in self.addresses.items() if k != self.name}


def place_of(
    addresses: Sequence[str],
    number: int,
    gpus: tuple[str, ...] | None = None,
    cores: tuple[int, ...] = (),
) -> Place:
    """Returns the place of a worker by its number.

    Args:
        addresses: Addresses of all workers, "host:port".
        number: Number of the worker.
        gpus: As of `Place`.
        cores: As of `Place`.
    """
    names = {f"worker {i}": address for i, address in enumerate(addresses)}
    return Place(f"worker {number}", number, names, gpus, cores)


def told_place(port: int | None = None) -> tuple[Place, str] | None:
    """Finds the place that somebody else has given to this process.

    Args:
        port: Port of the first worker on each host, for a task of Slurm.

    Returns:
        The place and who has given it, or None: `TF_CONFIG` names it, as under
        Kubernetes, or this process is a task of a Slurm step.

    Raises:
        ValueError: If `TF_CONFIG` or Slurm's variables make no sense.
    """
    if tf_config := os.environ.get("TF_CONFIG"):
        return place_in_tf_config(tf_config), "`TF_CONFIG`"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        job = os.environ.get("SLURM_JOB_ID", "0")
        own = _SLURM_PORTS + int(job) % 1000 * _PORTS_A_JOB
        return place_in_slurm(port or own), f"job {job} of Slurm"
    return None


def place_in_tf_config(tf_config: str) -> Place:
    """Returns the place that a value of `TF_CONFIG` describes.

    Args:
        tf_config: JSON text.

    Raises:
        ValueError: If the text describes none.

    Example:

    >>> text = '''{"cluster": {"worker": ["host0:12345", "host1:12345"]},
    ...            "task": {"type": "worker", "index": 1}}'''
    >>> place_in_tf_config(text).name
    'worker 1'
    """
    try:
        config = json.loads(tf_config)
        addresses = {
            f"{job} {index}": address
            for job in ("chief", "worker")
            for index, address in _numbered(config["cluster"].get(job, []))
        }
        name = f"{config['task']['type']} {config['task']['index']}"
        number = list(addresses).index(name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`TF_CONFIG` must be a JSON object with the addresses of a "
            '"cluster" and the "type" and "index" of a "task" in it. '
            f"Received: TF_CONFIG={tf_config}"
        ) from error
    return Place(name, number, addresses)


def _numbered(addresses: Any) -> list[tuple[int, str]]:
    """Numbers the addresses of a job in `TF_CONFIG`, in a list or by number."""
    if isinstance(addresses, dict):
        addresses = {int(index): a for index, a in addresses.items()}
        numbered = sorted(addresses.items())
    elif isinstance(addresses, list):
        numbered = list(enumerate(addresses))
    else:
        raise TypeError("The addresses must be in a list.")
    if not all(isinstance(address, str) for _, address in numbered):
        raise TypeError("An address must be text.")
    return numbered


def place_in_slurm(port: int) -> Place:
    """Returns the place of a task of a Slurm step.

    TensorFlow's resolver needs three corrections. It fails where a task has no
    GPU. It sets `CUDA_VISIBLE_DEVICES`, which Slurm has set already. And it
    sorts the hosts by name, n10 before n9, but takes a task's number in Slurm's
    order, where n9 comes first, for its place.

    Args:
        port: Port of the first worker on each host. The next worker there takes
            the next port.

    Raises:
        ValueError: If this process is not a task that `srun` has started.
    """
    # The other ways to start workers go without TensorFlow.
    import tensorflow as tf

    try:
        num_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        spec = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=port,
            # Any numbers that fit will do, because only the names are used.
            gpus_per_node=num_tasks,
            gpus_per_task=1,
            auto_set_gpu=False,
        ).cluster_spec()
        addresses = spec.as_dict()["worker"]
        own_port = port + int(os.environ["SLURM_LOCALID"])
        host = os.environ["SLURMD_NODENAME"]
        return place_of(addresses, addresses.index(f"{host}:{own_port}"))
    except (KeyError, RuntimeError, ValueError) as error:
        variables = {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("SLURM")
        }
        raise ValueError(
            "Workers of Slurm must be tasks that `srun` has started. Received: "
            f"{variables}, with which finding the workers ended in "
            f"{type(error).__name__}: {error}"
        ) from error


def silence(peers: Mapping[str, str]) -> str:
    """Says which workers accept no connection, after some seconds.

    Args:
        peers: Dict from names of workers to "host:port".
    """
    silent: list[str] = []
    # A worker that is just ending may still accept some.
    for attempt in range(3):
        time.sleep(attempt)
        for name, address in peers.items():
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), port), 1).close()
            except OSError:
                silent.append(f"{name} ({address})")
        if silent:
            return f"No connection to: {', '.join(silent)}."
    return "All others accept connections, so one is stopped or stuck."
