"""The process of some checks, which writes down what they find."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import json
import re
import sys
import time
import traceback
from typing import Any

import tensorflow as tf

from tf_regtopk.selftest import trial as trial_lib
from tf_regtopk.selftest.checks import machine
from tf_regtopk.selftest.checks import parts
from tf_regtopk.selftest.checks import registry
from tf_regtopk.selftest.trial import CheckError
from tf_regtopk.selftest.trial import SkippedError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERED = re.compile(r"\s*\(\d+\) ")
_PREFACES = ("Graph execution error", "Detected at node", "Stack trace for")


def run_check(
    check: Callable[[trial_lib.Devices], Iterator[parts.Case]],
    devices: trial_lib.Devices,
    report: Callable[[dict[str, Any]], None],
) -> bool:
    """Runs the cases of a check.

    Args:
        check: Function of `CHECKS`.
        devices: `Devices`.
        report: Function of a dict, called before and after each case.

    Returns:
        True if no case failed.
    """
    passed = True
    for name, function in check(devices):
        report({"case": name, "status": "running"})
        start = time.perf_counter()
        outcome: dict[str, Any] = {"case": name, "status": "ok"}
        try:
            outcome["found"] = function()
        except SkippedError as reason:
            outcome.update(status="skipped", found=str(reason))
        except Exception as error:
            passed = False
            outcome.update(
                status="failed",
                found=summary_of(error),
                traceback=traceback.format_exc(),
            )
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        report(outcome)
    return passed


def summary_of(error: Exception) -> str:
    """Joins the lines of an error that matter."""
    lines = []
    for line in _COLOURS.sub("", str(error)).splitlines():
        # A Keras layer lists its arguments at the end.
        if line.startswith("Arguments received by"):
            break
        # Indented lines are left out, because TensorFlow puts the lines of the
        # trace before its message.
        is_indented = line[:1].isspace() and not _NUMBERED.match(line)
        if line and not is_indented and not line.startswith(_PREFACES):
            lines.append(line.strip())
    if not isinstance(error, CheckError):
        lines.insert(0, f"{type(error).__name__}:")
    return " ".join(lines)[:600]


def main(argv: Sequence[str]) -> None:
    """Runs the checks that the settings name.

    The settings are a JSON object: `checks` (names), `output` (a file to which
    a line of JSON is added for each event), `kind`, `memory_limit`, `quick`,
    `size`, `worker_seconds` (within which workers must terminate).
    """
    settings = json.loads(argv[1])
    tf.get_logger().setLevel("ERROR")
    with open(settings["output"], "a", encoding="utf-8") as output:

        def write(**line: Any) -> None:
            print(json.dumps(line), file=output, flush=True)

        gpus = machine.describe_gpus()
        write(
            gpus=gpus,
            software=machine.describe_software(),
            is_cuda_build=tf.test.is_built_with_cuda(),
        )
        kind = settings["kind"]
        if kind == "auto":
            kind = "GPU" if gpus else "CPU"
        if kind == "GPU" and not gpus:
            return
        names, cpus = trial_lib.configure(kind, settings["memory_limit"])
        devices = trial_lib.Devices(
            names,
            cpus,
            settings["quick"],
            settings["size"],
            {**settings, "num_gpus": len(gpus)},
        )
        for name in settings["checks"]:
            write(check=name, status="running")

            def report(outcome: dict[str, Any], name: str = name) -> None:
                write(check=name, **outcome)

            passed = run_check(registry.CHECKS[name], devices, report)
            write(check=name, status="done")
            if not passed:
                # The process ends, because its collectives may fail from now
                # on. The other checks resume in a new process.
                break
    sys.stdout.flush()
    sys.stderr.flush()
