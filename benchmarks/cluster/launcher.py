"""Starts the workers of a benchmark, and tells all of them what to do."""

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time

from benchmarks.cluster import namespaces

_PROGRAM = "benchmarks.cluster.worker"
_PORTS = {
    "tensorflow": 5301,
    "torch": 5302,
    "study": 5303,
    "torch_study": 5304,
}


def run_and_clean_up(function, *args):
    """Calls a function that starts workers in a `namespaces.Network`.

    However it ends, by a signal too, nothing of the network is left; if
    something is, that is printed.

    Args:
        function: What to call.
        *args: Its arguments.

    Returns:
        Its result, or None if a worker failed, which is printed.
    """

    def exit_on(number, _):
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)  # By way of the clean-up.

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, exit_on)
    try:
        return function(*args)
    except WorkerError as e:
        print(e, file=sys.stderr)
        return None
    finally:
        namespaces.remove_rest()
        left = namespaces.leftovers(os.getpid())
        left += namespaces.children(os.getpid())
        if left:
            print(f"Left behind: {', '.join(left)}", file=sys.stderr)


class WorkerError(Exception):
    """A worker ended, or gave no answer in time."""


class Workers:
    """The processes of one kind, one in each worker's namespace.

    Args:
        kind: One of `worker.py`'s.
        network: `namespaces.Network`.
        log_dir: Folder for what they print.
        timeout: Seconds that an answer may take.
        threads: Threads that a worker computes with; 0 for the default.
        training: Dict of further arguments of all workers.
    """

    def __init__(self, kind, network, log_dir, timeout, threads, training):
        self._kind, self._timeout = kind, timeout
        self._processes, self._logs, self._unread = [], [], []
        port = _PORTS[kind]
        addresses = network.addresses
        hosts = [f"{address}:{port}" for address in addresses]
        for index in range(len(addresses)):
            args = {
                "index": index,
                "addresses": addresses,
                "port": port,
                "timeout": timeout,
                "threads": threads,
                **training,
            }
            config = {
                "cluster": {"worker": hosts},
                "task": {"type": "worker", "index": index},
            }
            log = pathlib.Path(log_dir, f"{kind}_{index}.txt")
            self._logs.append(log)
            with open(log, "wb") as errors:
                process = subprocess.Popen(
                    network.command(
                        *(index, sys.executable, "-m", _PROGRAM),
                        *(kind, json.dumps(args)),
                    ),
                    # On processors without AVX-512 TensorFlow's default
                    # multiplies matrices four times as slowly.
                    env={"TF_ENABLE_ONEDNN_OPTS": "1"}
                    | os.environ
                    | {
                        "TF_CONFIG": json.dumps(config),
                        "CUDA_VISIBLE_DEVICES": "-1",
                        "TF_CPP_MIN_LOG_LEVEL": "2",
                        "GLOO_SOCKET_IFNAME": "eth0",
                    },
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    # Ctrl-C is for the launcher, which then ends the workers.
                    start_new_session=True,
                )
            self._processes.append(process)
            self._unread.append(b"")

    @classmethod
    @contextlib.contextmanager
    def start_all(cls, threads, network, log_dir, timeout, training):
        """Starts the workers of several kinds, and ends them at the end.

        Args:
            threads: Dict from kind to the number of threads.
            network: As of the class.
            log_dir: As of the class.
            timeout: As of the class.
            training: As of the class.

        Yields:
            Dict from kind to `Workers`.
        """
        workers = {}
        try:
            for kind, number in threads.items():
                workers[kind] = cls(
                    kind, network, log_dir, timeout, number, training
                )
            for started in workers.values():
                started.versions = started._answers()[0]["versions"]
            yield workers
        finally:
            for started in workers.values():
                started.close()

    def ask(self, **command):
        """Gives all workers a command, and returns their answers."""
        line = json.dumps(command).encode() + b"\n"
        for index, process in enumerate(self._processes):
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                self._fail(index, "ended")
        return self._answers(command)

    def _answers(self, command="the start"):
        deadline = time.monotonic() + self._timeout
        answers = {}
        with selectors.DefaultSelector() as selector:
            for index, process in enumerate(self._processes):
                selector.register(process.stdout, selectors.EVENT_READ, index)
            while len(answers) < len(self._processes):
                ready = selector.select(max(0, deadline - time.monotonic()))
                if not ready:
                    [index, *_] = set(range(len(self._processes))) - {*answers}
                    self._fail(index, f"gave no answer to {command}")
                for key, _ in ready:
                    index = key.data
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        self._fail(index, f"ended during {command}")
                    line, end, _ = (self._unread[index] + data).partition(b"\n")
                    self._unread[index] = b"" if end else line
                    if end:
                        answers[index] = json.loads(line)
        return [answers[index] for index in range(len(self._processes))]

    def _fail(self, index, what):
        log = self._logs[index].read_text("utf-8", errors="replace")
        raise WorkerError(
            f"Worker {index} of {self._kind} {what}. It printed:\n{log[-3000:]}"
        )

    def close(self):
        """Ends the processes."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
