"""Starts the workers of a cluster as processes on this machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import fork_server
import paths


def free_addresses(count):
    """Addresses that are free now; TensorFlow cannot take over a held one."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]


def tf_config(addresses, index):
    """The value of `TF_CONFIG` for one worker."""
    return json.dumps(
        {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
    )


class Process:
    """A Python process whose output goes to a file.

    Args:
        args: The arguments of the interpreter.
        output_path: The file for what it writes to both of its streams.
        **env: Environment variables to add.
    """

    def __init__(self, args, output_path, **env):
        self.output_path = output_path
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **env}
        search = [str(paths.ROOT), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, search))
        with open(output_path, "wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, args)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self):
        return self.output_path.read_text(errors="replace")

    def wait(self, timeout):
        """Returns the exit status, or fails with the output after `timeout`."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"No end within {timeout} s. Output:\n{self.output[-5000:]}"
            ) from None

    def wait_for(self, text, timeout):
        """Waits until the output contains `text` and returns the output."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.popen.poll() is not None
            output = self.output
            if text in output:
                return output
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"No {text!r} in the output:\n{output[-5000:]}"
                )
            time.sleep(0.1)

    def end(self):
        """Ends it, first in a way that lets it end what it has started."""
        if self.popen.poll() is None:
            self.popen.terminate()
            self.popen.send_signal(signal.SIGCONT)
            try:
                self.popen.wait(5)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()


@contextlib.contextmanager
def processes():
    """Gives a list; every `Process` put in it is ended at the end."""
    started = []
    try:
        yield started
    finally:
        for process in started:
            process.end()


def run_workers(script, num_workers, directory, timeout, args=(), network=None):
    """Runs `script` on every worker of a cluster until all have ended.

    Args:
        script: The script. Its argument is the file to write a JSON result to.
        num_workers: The number of workers. 0 is one process and no cluster.
        directory: Where files can be written.
        timeout: Seconds after which all workers are ended.
        args: Further arguments of the script.
        network: The file of a network namespace for the workers, if any.

    Returns:
        The results of the workers.
    """
    numbers = range(max(1, num_workers))
    results = [directory / f"result_{i}.json" for i in numbers]
    output_paths = [directory / f"output_{i}.txt" for i in numbers]
    for _ in range(3):
        addresses = free_addresses(num_workers)
        workers = [
            fork_server.process(
                script,
                [results[i], *args],
                output_paths[i],
                network=network,
                CUDA_VISIBLE_DEVICES="-1",
            )
            for i in numbers
        ]
        for i in range(num_workers):
            workers[i]["env"]["TF_CONFIG"] = tf_config(addresses, i)
        statuses = fork_server.run(workers, timeout)
        if not any(statuses) and None not in statuses:
            return [json.loads(result.read_text()) for result in results]
        outputs = [path.read_text(errors="replace") for path in output_paths]
        # Another process was quicker to take a port.
        if not any("Could not start gRPC server" in o for o in outputs):
            break
    outputs = "\n\n".join(output[-5000:] for output in outputs)
    raise AssertionError(
        f"Exit statuses of the workers (`None`: no end within {timeout} s): "
        f"{statuses}. Outputs:\n{outputs}"
    )


def run_workers_alone(script, num_workers, directory, timeout, args=()):
    """Runs workers on a loopback interface that nothing else uses, if it can.

    Args:
        script: As of `run_workers`.
        num_workers: As of `run_workers`.
        directory: As of `run_workers`.
        timeout: As of `run_workers`.
        args: As of `run_workers`.

    Returns:
        The results of the workers, and whether they were alone.
    """
    with network_of_its_own() as network:
        results = run_workers(
            script, num_workers, directory, timeout, args, network
        )
    return results, network is not None


@contextlib.contextmanager
def network_of_its_own():
    """Gives the file of a network namespace, None where there can be none.

    The namespace has a loopback interface, and ends with the process here that
    is its first.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        yield None
        return
    # Without any device up there is no loopback interface either.
    script = "ip link set lo up && echo ready && cat"
    first = subprocess.Popen(
        [unshare, "--net", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        is_there = first.stdout.readline() == b"ready\n"
        yield f"/proc/{first.pid}/ns/net" if is_there else None
    finally:
        first.communicate()
