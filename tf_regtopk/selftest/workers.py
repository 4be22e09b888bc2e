"""Two workers on this machine, for the self-test.

    python -m tf_regtopk.selftest.workers SETTINGS

is one of them. Each worker gets half of the devices; a single GPU serves both.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any
from typing import Literal

import numpy as np
import tensorflow as tf

import tf_regtopk
from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import SkippedError

NUM_WORKERS = 2
COMMAND = (sys.executable, "-m", "tf_regtopk.selftest.workers")
# A worker exits with this status if TensorFlow told it that another is lost.
LOST_A_WORKER = 3
# A worker must terminate after so many seconds without the other.
TIMEOUT_SECONDS = 30.0
# The worker that is lost would take so many steps otherwise.
MANY_STEPS = 100_000

FORMS: dict[str, dict[str, Any]] = {
    "RegTopK": {"sparsifier": tf_regtopk.RegTopK(0.01)},
    'TopK, Codec("golomb", "natural")': {
        "sparsifier": tf_regtopk.TopK(0.01),
        "codec": tf_regtopk.Codec("golomb", "natural"),
    },
    "RegTopK, ReduceScatter": {
        "sparsifier": tf_regtopk.RegTopK(0.01),
        "topology": tf_regtopk.ReduceScatter(),
    },
}


# ----- The process that starts them -----


def workers_agree(
    devices: trial_lib.Devices, communication: Literal["AUTO", "NCCL"]
) -> None:
    """Trains with two workers, and compares their weights and state.

    Args:
        devices: `Devices`.
        communication: `"AUTO"` or `"NCCL"`.
    """
    num_gpus = devices.settings.get("num_gpus", 0)
    if communication == "NCCL" and num_gpus < NUM_WORKERS:
        raise SkippedError(
            f"NCCL takes a GPU for each worker, and here are {num_gpus}"
        )
    limit = devices.settings["worker_seconds"]
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        forms = list(FORMS)[: 1 if devices.quick else None]
        with started(
            devices,
            folder,
            communication=communication,
            forms=forms,
            # The timeout is long because one worker may compile for longer than
            # the other.
            timeout_seconds=limit,
        ) as workers:
            deadline = time.monotonic() + limit
            for number, worker in enumerate(workers):
                status = worker.wait(deadline - time.monotonic())
                if status != 0:
                    raise CheckError(
                        f"worker {number} {_ended(status, limit)}: "
                        f"{worker.last_words}"
                    )
        files = [np.load(worker.result) for worker in workers]
        for number, name in enumerate(forms):
            _compare(name, [_arrays(file, number) for file in files])


def _arrays(file: Mapping[str, np.ndarray], number: int) -> list[np.ndarray]:
    return [file[f"{what}{number}"] for what in ("weights", "held_back")]


def _compare(name: str, arrays: Sequence[Sequence[np.ndarray]]) -> None:
    """Raises `CheckError` unless workers agree, and no gradient is lost."""
    (weights, held_back), *others = arrays
    num_replicas = NUM_WORKERS * len(held_back)
    for number, (other, _) in enumerate(others, start=1):
        for step, (ours, first) in enumerate(zip(other, weights, strict=True)):
            trial_lib.expect_same(
                f"{name}: weights of worker {number} after step {step}",
                ours,
                first,
                "those of worker 0",
            )
    total = trial_lib.make_gradients(num_replicas).sum(axis=(0, 1))
    held_back = sum(held.sum(axis=0) for _, held in arrays)
    trial_lib.expect_close(
        f"{name}: what was applied and what is held back",
        -weights[-1] / trial_lib.LEARNING_RATE + held_back,
        total,
        "the sum of all gradients",
    )


def lost_worker_ends_the_other(devices: trial_lib.Devices) -> str:
    """Kills a worker; the other worker has to terminate on its own."""
    limit = devices.settings["worker_seconds"]
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        with started(devices, folder, num_steps=MANY_STEPS) as workers:
            first, second = workers
            deadline = time.monotonic() + limit
            while not all("step 3\n" in w.output for w in workers):
                if time.monotonic() > deadline or not all(
                    w.popen.poll() is None for w in workers
                ):
                    raise CheckError(
                        "the workers do not get to the third step: "
                        f"{first.last_words} | {second.last_words}"
                    )
                time.sleep(0.05)
            os.kill(second.popen.pid, signal.SIGKILL)
            start = time.monotonic()
            # The limit is larger than the timeout, because TensorFlow needs
            # some time as well.
            limit = 3 * TIMEOUT_SECONDS
            status = first.wait(limit)
            seconds = time.monotonic() - start
            if status != LOST_A_WORKER:
                raise CheckError(
                    "the worker left alone must end by an error of a "
                    f"collective, and {_ended(status, limit)}: "
                    f"{first.last_words}"
                )
    return f"the other ends after {seconds:.0f} s"


def _ended(status: int | None, limit: float) -> str:
    if status is None:
        return f"has not ended after {limit:g} s"
    return f"ended with status {status}"


class Worker:
    """A process that is one of the workers.

    Args:
        settings: Settings of the worker, without the output.
        folder: Folder of the worker's files.
        environ: Environment variables to add.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: pathlib.Path,
        environ: Mapping[str, str],
    ) -> None:
        number = settings["number"]
        self.result = folder / f"result_{number}.npz"
        self._output = folder / f"output_{number}.txt"
        settings = {**settings, "output": str(self.result)}
        with open(self._output, "wb") as output:
            self.popen = subprocess.Popen(
                [*COMMAND, json.dumps(settings)],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """Text that the worker has written to its standard streams."""
        return self._output.read_text("utf-8", errors="replace")

    @property
    def last_words(self) -> str:
        """Last lines that the worker has written, joined."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return " ".join(lines[-3:])[-500:]

    def wait(self, seconds: float) -> int | None:
        """Waits for the exit status, None if there is none after `seconds`."""
        try:
            return self.popen.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Terminates the worker, if it has not ended."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextlib.contextmanager
def started(
    devices: trial_lib.Devices, folder: pathlib.Path, **settings: Any
) -> Iterator[list[Worker]]:
    """Starts two workers, and terminates them afterwards."""
    settings = {
        "kind": devices.kind,
        "memory_limit": devices.settings.get("memory_limit"),
        "communication": "AUTO",
        "timeout_seconds": TIMEOUT_SECONDS,
        "num_steps": trial_lib.NUM_STEPS,
        **settings,
    }
    workers = []
    try:
        addresses = _free_addresses()
        for number in range(NUM_WORKERS):
            environ = {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": {"worker": addresses},
                        "task": {"type": "worker", "index": number},
                    }
                ),
                # Loopback is excluded, because a proxy cannot serve it.
                "no_proxy": "127.0.0.1",
                **visible_gpus(number, devices),
            }
            workers.append(
                Worker({**settings, "number": number}, folder, environ)
            )
        yield workers
    finally:
        for worker in workers:
            worker.end()


def _free_addresses() -> list[str]:
    """Finds addresses that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket()) for _ in range(NUM_WORKERS)
        ]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]


def visible_gpus(number: int, devices: trial_lib.Devices) -> dict[str, str]:
    """Returns the environment that gives a worker its share of the GPUs."""
    num_gpus = devices.settings.get("num_gpus", 0)
    if devices.kind != "GPU" or num_gpus < NUM_WORKERS:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [*map(str, range(num_gpus))]
    share = num_gpus // NUM_WORKERS
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(names[number * share :][:share]),
    }


# ----- A worker -----


def work(settings: Mapping[str, Any]) -> None:
    """Trains as one of the workers, and writes its weights and state."""
    options = tf.distribute.experimental
    strategy = tf_regtopk.MultiWorkerMirroredStrategy(
        communication_options=options.CommunicationOptions(
            implementation=options.CommunicationImplementation[
                settings["communication"]
            ]
        ),
        timeout_seconds=settings["timeout_seconds"],
    )
    kinds = {
        tf.DeviceSpec.from_string(device).device_type
        for device in strategy.extended.worker_devices
    }
    if kinds != {settings["kind"]}:
        raise CheckError(
            f"the replicas are on {sorted(kinds)}, not on {settings['kind']}s"
        )
    num_replicas = strategy.num_replicas_in_sync
    if settings["num_steps"] == MANY_STEPS:
        trial = trial_lib.Trial(strategy, **FORMS["RegTopK"])
        gradients = trial_lib.make_gradients(num_replicas)
        for number in range(MANY_STEPS):
            trial.step(gradients[number % len(gradients)])
            if number < 10:
                print(f"step {number}", flush=True)
        return
    # Any, because a checker would take an array for `allow_pickle`.
    arrays: dict[str, Any] = {}
    for number, name in enumerate(settings["forms"]):
        trial = trial_lib.Trial(strategy, **FORMS[name])
        gradients = trial_lib.make_gradients(num_replicas)
        arrays[f"weights{number}"] = trial_lib.run(trial, gradients)
        feedback, _ = trial_lib.states_of(trial.optimizer)
        arrays[f"held_back{number}"] = np.array(
            [held for held, *_ in feedback.local_arrays()]
        )
    np.savez(settings["output"], **arrays)


def main(argv: Sequence[str]) -> None:
    """Works according to the settings, and terminates the process."""
    settings = json.loads(argv[1])
    tf.get_logger().setLevel("ERROR")
    gpus = tf.config.list_physical_devices("GPU")
    if settings["kind"] == "GPU" and len(gpus) == 1:
        trial_lib.split(gpus[0], 1, settings["memory_limit"])
    status = 0
    try:
        work(settings)
    except Exception as error:
        traceback.print_exc()
        is_loss = isinstance(
            error,
            (
                tf.errors.AbortedError,
                tf.errors.CancelledError,
                tf.errors.DeadlineExceededError,
                tf.errors.UnavailableError,
            ),
        )
        status = LOST_A_WORKER if is_loss else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # The exit is immediate, because at a regular exit TensorFlow may wait for a
    # worker that is gone.
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv)
