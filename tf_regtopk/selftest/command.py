r"""Checks in a few minutes that the library works on this machine's devices.

    python -m tf_regtopk.selftest

docs/gpus.md explains the table. `checks/` has the checks.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from types import FrameType
from typing import Any
from typing import Literal

from absl import app
from absl import flags

from tf_regtopk.selftest import checks
from tf_regtopk.selftest import gpus
from tf_regtopk.selftest import processes
from tf_regtopk.selftest.processes import Child

# These are the exit statuses; USAGE stands for wrong arguments.
PASSED, FAILED, USAGE, NO_GPU = 0, 1, 2, 3

# The gradient of the step that is timed has so many entries.
_SIZES = {"GPU": 25_600_000, "CPU": 1_000_000}


def line_of(result: dict[str, Any]) -> str:
    """Formats a result as a line of the table."""
    status = {"failed": "FAILED"}.get(result["status"], result["status"])
    return (
        f"{status:8}{result['check']:16}{result['seconds']:6.1f} s  "
        f"{result['found']}"
    )


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command's flags."""
    flags.DEFINE_enum(
        "device_type",
        "auto",
        ["auto", "GPU", "CPU"],
        "What to run on. auto: GPUs where TensorFlow sees one.",
        flag_values,
    )
    flags.DEFINE_list(
        "checks",
        None,
        f"Only these, of {', '.join(checks.CHECKS)}.",
        flag_values,
    )
    flags.DEFINE_enum(
        "workers",
        "2",
        ["0", "2"],
        "0 leaves out the checks in which two processes train together.",
        flag_values,
    )
    flags.DEFINE_boolean(
        "quick", False, "Fewer cases of fewer checks.", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "size",
        None,
        "Entries of the gradient of the step that is timed. Defaults to 25.6 "
        "million on GPUs, 1 million on CPUs.",
        lower_bound=10_000,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "jobs",
        None,
        "Processes at a time. Defaults to the number of cores, at most 16, and "
        "on a GPU as its memory allows.",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "limit_seconds",
        200.0,
        "Of one check.",
        lower_bound=1.0,
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "output", "selftest.json", "The file of all results.", flag_values
    )


def batches_of(
    names: Sequence[str], is_quick: bool, jobs: int
) -> list[list[str]]:
    """Makes lists of checks, one for each process.

    If there are many cores, each check has a process of its own. Otherwise some
    checks share a process, because starting a process takes as long as many a
    check.
    """
    alone = [name for name in names if name in checks.ALONE]
    names = [name for name in names if name not in alone]
    # Checks of workers come first, because they wait for much of their time.
    names.sort(key=lambda name: name not in checks.OF_WORKERS)
    num_batches = min(len(names), jobs if is_quick else 2 * jobs)
    batches = [names[i::num_batches] for i in range(num_batches)]
    return batches + [[name] for name in alone]


class SelfTest:
    """One run of the command.

    Args:
        args: The flags.
        names: Names of the checks.
        folder: Folder of the processes' files.
    """

    def __init__(
        self, args: flags.FlagValues, names: Sequence[str], folder: pathlib.Path
    ) -> None:
        self._args = args
        self._names = names
        self._folder = folder
        self._started = time.monotonic()
        self._results: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {
            "exit_status": FAILED,
            "checks": self._results,
        }
        self._environ = {
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            **os.environ,
        }
        self._settings = {
            "memory_limit": gpus.SMALLEST_LIMIT,
            "quick": args.quick,
            "worker_seconds": 0.8 * args.limit_seconds,
        }

    def run(self) -> int:
        """Runs the checks, prints the table, and returns the exit status."""
        kind, first, free = self._args.device_type, None, None
        if kind == "auto" and gpus.driver_error():
            kind = "CPU"
        names = ["environment", *self._names]
        if kind != "CPU":
            free = gpus.gpu_memory()
            first = self._start_looking(kind)
            kind = self._see(first, kind)
            if kind is None:
                first.end()
                return self._end(self.report["exit_status"])
            names = names[1:]
        jobs = self._args.jobs or gpus.default_jobs(kind, free)
        self._say(kind, jobs)
        run = processes.Run(
            batches_of(names, self._args.quick, jobs),
            checks.ALONE,
            jobs,
            self._args.limit_seconds,
            lambda batch: self._start(kind, batch, jobs, free),
            self._show,
        )
        if first:
            run.add(first)
        run.wait()
        self.report.update(run.facts)
        has_failed = any(r["status"] == "failed" for r in self._results)
        return self._end(FAILED if has_failed else PASSED)

    def _start_looking(self, kind: Literal["auto", "GPU"]) -> Child:
        """Starts the process that reports the devices and runs a check."""
        environ = {
            **self._environ,
            # These variables make TensorFlow log the libraries that it misses.
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "dso_loader=3",
        }
        settings = {**self._settings, "kind": kind, "size": 0}
        return Child(["environment"], self._folder, settings, environ)

    def _see(
        self, child: Child, kind: Literal["auto", "GPU"]
    ) -> Literal["GPU", "CPU"] | None:
        """Returns the kind of devices to take, None if there are none."""
        try:
            facts = child.wait_for_facts(self._args.limit_seconds)
        except BaseException:
            child.end()
            raise
        if facts is None:
            child.end()
            self._show(
                {
                    "check": "environment",
                    "status": "failed",
                    "seconds": round(time.monotonic() - self._started, 1),
                    "found": "TensorFlow does not say what devices it sees: "
                    + " | ".join(child.last_words[-3:]),
                    "output": child.last_words,
                }
            )
            return None
        self.report.update(facts)
        if facts["gpus"]:
            return "GPU"
        if kind == "auto":
            return "CPU"
        reasons = gpus.why_no_gpu(
            facts["software"], facts["is_cuda_build"], child.all_words
        )
        print("\n".join(reasons), flush=True)
        self.report.update(exit_status=NO_GPU, reasons=reasons)
        return None

    def _say(self, kind: Literal["GPU", "CPU"], jobs: int) -> None:
        """Prints the devices that the checks run on."""
        where = ", ".join(self.report.get("gpus", ()))
        if kind == "CPU":
            where = f"CPU, {os.cpu_count()} cores"
            if self._args.device_type == "auto":
                reason = gpus.driver_error() or "TensorFlow sees none"
                where += f" (no GPU: {reason})"
        self.report.update(device_type=kind, jobs=jobs)
        print(f"On {where}; up to {jobs} checks at a time", flush=True)

    def _start(
        self,
        kind: Literal["GPU", "CPU"],
        batch: list[str],
        jobs: int,
        free: int | None,
    ) -> Child:
        """Starts a process for some checks."""
        is_alone = bool(checks.ALONE & set(batch))
        environ = dict(self._environ)
        if kind == "CPU":
            environ["CUDA_VISIBLE_DEVICES"] = "-1"
            if not is_alone:
                # XLA does not optimize, because compiling takes most of the
                # time.
                environ.setdefault(
                    "XLA_FLAGS", "--xla_backend_optimization_level=0"
                )
        settings = {
            **self._settings,
            "kind": kind,
            "size": self._args.size or _SIZES[kind],
            "memory_limit": gpus.memory_limit(free, 1 if is_alone else jobs),
        }
        return Child(batch, self._folder, settings, environ)

    def _show(self, result: dict[str, Any]) -> None:
        self._results.append(result)
        print(line_of(result), flush=True)
        # The report is written after each result, because this process may be
        # terminated.
        self.write()

    def _end(self, exit_status: int) -> int:
        seconds = round(time.monotonic() - self._started, 1)
        self.report.update(exit_status=exit_status, seconds=seconds)
        self.write()
        if self._results:
            line = summary_line(self._results, seconds)
            print(f"{line}. Details: {self._args.output}", flush=True)
        return exit_status

    def write(self) -> None:
        """Writes the report."""
        with open(self._args.output, "w", encoding="utf-8") as file:
            json.dump(self.report, file, indent=1)
            file.write("\n")


def summary_line(results: Sequence[dict[str, Any]], seconds: float) -> str:
    """Formats the number of checks that passed, and the names of the others."""
    by_status: dict[str, list[str]] = {"ok": [], "failed": [], "skipped": []}
    for result in results:
        by_status[result["status"]].append(result["check"])
    parts = [f"{len(by_status['ok'])} checks passed"]
    for status in ("failed", "skipped"):
        if by_status[status]:
            names = ", ".join(by_status[status])
            parts.append(f"{len(by_status[status])} {status} ({names})")
    return f"{', '.join(parts)} in {seconds:.0f} s"


def _raise_exit(number: int, frame: FrameType | None) -> None:
    """Exits like Ctrl-C, and so terminates the processes that were started."""
    del frame
    sys.exit(128 + number)


def run(args: flags.FlagValues) -> int:
    """Runs the self-test.

    Args:
        args: The flags.

    Returns:
        The exit status.
    """
    names = args.checks or list(checks.QUICK if args.quick else checks.CHECKS)
    unknown = set(names) - set(checks.CHECKS)
    if unknown:
        raise app.UsageError(
            f"`--checks` must be of {', '.join(checks.CHECKS)}. "
            f"Received: {', '.join(sorted(unknown))}",
            USAGE,
        )
    left_out = {"environment"}  # It always runs.
    if args.workers == "0":
        left_out |= checks.OF_WORKERS
    names = [name for name in dict.fromkeys(names) if name not in left_out]
    try:
        with open(args.output, "a", encoding="utf-8"):
            pass  # Now, and not when checks have taken minutes.
    except OSError as error:
        raise app.UsageError(
            f"`--output` must be a file that can be written. Received: {error}",
            USAGE,
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        return SelfTest(args, names, pathlib.Path(folder)).run()


def main(argv: Sequence[str]) -> int:
    """Runs the self-test, and returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}", USAGE)
    signal.signal(signal.SIGTERM, _raise_exit)
    return run(flags.FLAGS)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags like absl, with the exit status of a wrong argument."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"{error}\nSee --help.", file=sys.stderr)
        sys.exit(USAGE)
