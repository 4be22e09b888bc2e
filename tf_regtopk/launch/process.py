"""A process of a worker, started with what its place in the cluster asks."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import os
import subprocess
import sys
from typing import Any

from tf_regtopk.launch import bootstrap
from tf_regtopk.launch import cluster


def start(
    place: cluster.Place,
    command: Sequence[str],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Starts `bootstrap.py` in a process that ends with this one.

    Args:
        place: The worker's `cluster.Place`.
        command: The script and its arguments.
        settings: What `bootstrap.main` takes beside cores and launcher.
        environment: Variables beside those of the launcher and the GPUs.
        stdin: As of `subprocess.Popen`.

    Returns:
        The process, with both of its outputs in one pipe.
    """
    everything = {
        "cores": list(place.cores) or None,
        "launcher": os.getpid(),
        **settings,
    }
    return subprocess.Popen(
        [
            sys.executable,
            bootstrap.__file__,
            json.dumps(everything),
            *command,
        ],
        env={
            **_inherited(),
            **_visible_gpus(place),
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Ctrl-C is for the launcher, which then ends the workers.
        start_new_session=True,
    )


def _visible_gpus(place: cluster.Place) -> dict[str, str]:
    if place.gpus is None:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus) or "-1"}


def _inherited() -> dict[str, str]:
    """This process's environment, but for what is the launchers' alone."""
    return {k: v for k, v in os.environ.items() if k != cluster.SECRET_VARIABLE}
