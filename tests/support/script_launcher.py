"""Starts the launcher, for scripts that need no TensorFlow."""

import os
import subprocess
import sys

import paths

# What a script may want to say of itself.
PRELUDE = '''
import json, os, pathlib, signal, sys, time

config = json.loads(os.environ["TF_CONFIG"])
number = config["task"]["index"]
notes = pathlib.Path(os.environ["TF_REGTOPK_LAUNCH_DIR"])
is_first_attempt = notes.name == "attempt-0"


def meet(directory=notes):
    """Waits for the other workers, however busy the machine is."""
    (directory / f"here-{number}").touch()
    num_workers = len(config["cluster"]["worker"])
    while len([*directory.glob("here-*")]) < num_workers:
        time.sleep(0.01)


def lose_another(name="UnavailableError"):
    raise type(name, (Exception,), {"__module__": "tensorflow.python.x"})(
        "Connection reset\\nAdditional GRPC error information"
    )

'''


def start(*args, **env):
    """Starts the launcher, with what it prints in a pipe.

    Args:
        *args: Its arguments.
        **env: Environment variables beside those of this process.

    Returns:
        A `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "tf_regtopk.run", "--device=cpu"]
        + [*map(str, args)],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
