"""Starts the launcher, for scripts that need no TensorFlow."""

import os
import signal
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


def meet(directory=notes, where="here"):
    """Waits for the other workers, however busy the machine is."""
    (directory / f"{where}-{number}").touch()
    num_workers = len(config["cluster"]["worker"])
    while len([*directory.glob(f"{where}-*")]) < num_workers:
        time.sleep(0.01)


def back_up_when_asked(directory=notes):
    """Does what `Backup` does: when one is asked to end, all of them end."""
    name = lambda what: notes / f"{what}-{os.getpid()}"
    asked = directory / "asked"
    signal.signal(signal.SIGTERM, lambda *_: asked.touch())
    name("backup").write_text("folder")
    name("can_back_up").write_text("")
    meet(directory, "prepared")
    (directory / "all_can_back_up").touch()
    print("ready")
    while not asked.exists():
        time.sleep(0.01)
    name("backed_up").write_text("epoch 1, step 2")
    sys.exit(143)


def lose_another(name="UnavailableError"):
    raise type(name, (Exception,), {"__module__": "tensorflow.python.x"})(
        "Connection reset\\nAdditional GRPC error information"
    )

'''


def is_running(pid):
    """Whether there is such a process, other than one nobody waits for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(*args, cwd=None, **env):
    """Starts the launcher, with what it prints in a pipe.

    Args:
        *args: Its arguments.
        cwd: Its working directory, by default that of this process.
        **env: Environment variables beside those of this process.

    Returns:
        A `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "tf_regtopk.run", "--device=cpu"]
        + [*map(str, args)],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT), **env},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests may run in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
