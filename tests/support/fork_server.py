"""Runs programs in processes that share one import of TensorFlow.

To import it takes a process longer than most of the tests' programs then run.
So a server imports it once, and forks for each of them.  They begin as fresh as
any process: the imports are all that has happened before.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import paths


def process(program, args, output_path, error_path=None, network=None, **env):
    """A process for `run`.

    Args:
        program: Path of a script, or name of a module.
        args: Its arguments.
        output_path: The file for what it writes.
        error_path: The file for what it writes to standard error, if another.
        network: The file of the network namespace that it is to join, if any.
        **env: Environment variables to add.
    """
    return {
        "network": network and str(network),
        "program": str(program),
        "args": [str(arg) for arg in args],
        "output_paths": [str(output_path), str(error_path or output_path)],
        "env": env,
    }


def run(processes, timeout):
    """Runs processes at once until all have succeeded or one has failed.

    Args:
        processes: List of what `process` returns.
        timeout: Seconds after which all of them are ended.

    Returns:
        List of their exit statuses; `None` for those that had to be ended.
    """
    server = _server()
    server.stdin.write(json.dumps([processes, timeout]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def run_one(program, args, timeout=300, **env):
    """The `subprocess.CompletedProcess` of one of them, with its output."""
    with tempfile.TemporaryDirectory() as directory:
        outs = [os.path.join(directory, name) for name in ("out", "err")]
        [status] = run([process(program, args, *outs, **env)], timeout)
        outputs = []
        for path in outs:
            with open(path, encoding="utf-8", errors="replace") as file:
                outputs.append(file.read())
    assert status is not None, f"No end within {timeout} s: {outputs}"
    return subprocess.CompletedProcess([program, *args], status, *outputs)


@functools.cache
def _server():
    search = [str(paths.ROOT), os.environ.get("PYTHONPATH", "")]
    server = subprocess.Popen(
        [sys.executable, __file__],
        # A library's threads would be missing in the processes to come.
        env={
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_close, server)
    return server


def _close(server):
    server.stdin.close()
    server.wait()


# ----- The server -----


def _fork(program, args, output_paths, network, env):
    """Starts a process and returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(env)
        for stream, path in enumerate([os.devnull, *output_paths]):
            mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            os.dup2(os.open(path, mode if stream else os.O_RDONLY), stream)
        if network:
            _join(network)
        sys.argv = [program, *args]
        if program.endswith(".py"):
            sys.path[0] = os.path.dirname(program)
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path[0] = os.getcwd()
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as e:
        status = e.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _join(network):
    """Makes a network namespace that of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(network) as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"Cannot join {network}")


def _run(processes, timeout):
    pids = [_fork(**arguments) for arguments in processes]
    statuses = [None] * len(pids)
    deadline = time.monotonic() + timeout
    parent = os.getppid()
    while True:
        for i, pid in enumerate(pids):
            if statuses[i] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[i] = os.waitstatus_to_exitcode(status)
        # The first to fail leaves the others waiting.
        if None not in statuses or any(statuses):
            break
        if time.monotonic() > deadline or os.getppid() != parent:
            break
        time.sleep(0.02)
    for status, pid in zip(statuses, pids, strict=True):
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return statuses


def _main():
    importlib.import_module("tf_regtopk")
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _main()
