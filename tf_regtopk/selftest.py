r"""Whether the library works on this machine's devices, in a few minutes.

    python -m tf_regtopk.selftest

docs/gpus.md says what the table means. `selftest_checks.py` has the checks.
"""

import contextlib
import ctypes
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

from tf_regtopk import selftest_checks

# Exit statuses; 2 is what a command says of its arguments.
PASSED, FAILED, USAGE, NO_GPU = 0, 1, 2, 3

# Of a GPU, which nobody can ask for its size: megabytes.
_ASSUMED_MEMORY = 8000
# What a process takes of a GPU beside its arrays: megabytes.
_CONTEXT_MEMORY = 1200
_SMALLEST_LIMIT = 500
# What TensorFlow writes where it cannot use a GPU.
_TELLING = (
    "Could not find cuda drivers",
    "Could not load dynamic library",
    "Cannot dlopen",
    "failed call to cuInit",
    "CUDA_ERROR",
    "no kernel image",
    "Skipping registering GPU devices",
    "Ignoring visible gpu device",
)


class Child:
    """A process that runs some of the checks.

    Args:
        names: Names of the checks.
        folder: Where its files go.
        settings: What `selftest_checks` is told.
        environ: Environment variables to add.
    """

    def __init__(self, names, folder, settings, environ):
        self.left = list(names)
        self.has_finished = False
        self.since = time.monotonic()
        stem = f"{names[0]}-{time.monotonic_ns()}"
        self.output = folder / f"{stem}.jsonl"
        self.output.touch()
        self.stderr = folder / f"{stem}.txt"
        self._read = 0
        settings = {
            **settings,
            "checks": list(names),
            "output": str(self.output),
        }
        with open(self.stderr, "wb") as stderr:
            self.popen = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tf_regtopk.selftest_checks",
                    json.dumps(settings),
                ],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def new_lines(self):
        """What it has reported since the last call, as dicts."""
        data = self.output.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[self._read : end].splitlines()
        self._read = end
        return [json.loads(line) for line in lines]

    def end(self):
        """Ends it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    @property
    def last_words(self):
        """The end of what it has written, without TensorFlow's notices."""
        lines = self.stderr.read_text("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-40:]


class Run:
    """All checks, several at a time, with a line for each that has ended.

    Args:
        batches: Lists of names of checks, each for a process.
        alone: Names of those during which nothing else is to run.
        jobs: How many processes run at once.
        limit: Seconds of a check.
        start: Function of a list of names that returns a `Child`.
        show: Function of a result, a dict.
    """

    def __init__(self, batches, alone, jobs, limit, start, show):
        self._waiting = [list(batch) for batch in batches]
        self._alone = set(alone)
        self._jobs = jobs
        self._limit = limit
        self._start = start
        self._show = show
        self._children = []
        self._cases = {}

    def add(self, child):
        """Watches a process that has been started already."""
        self._children.append(child)

    def wait(self):
        """Runs all."""
        try:
            while self._waiting or self._children:
                self._start_some()
                for child in list(self._children):
                    self._look_at(child)
                time.sleep(0.05)
        finally:
            for child in self._children:
                child.end()

    def _start_some(self):
        while self._waiting and len(self._children) < self._jobs:
            is_alone = self._alone & set(self._waiting[0])
            if is_alone and self._children:
                return
            self._children.append(self._start(self._waiting.pop(0)))
            if is_alone:
                return

    def _look_at(self, child):
        ended = child.popen.poll() is not None
        for line in child.new_lines():
            self._take(child, line)
        if not ended and time.monotonic() - child.since < self._limit:
            return
        child.end()
        self._children.remove(child)
        if not child.left:
            return
        if not ended:
            self._finish(
                child, child.left[0], f"no end after {self._limit:g} s"
            )
        elif child.popen.returncode or not child.has_finished:
            words = " | ".join(child.last_words[-3:])
            self._finish(
                child,
                child.left[0],
                f"the process ended with status {child.popen.returncode}: "
                f"{words}",
            )
        # After a check that failed the others get another process.
        if child.left:
            self._waiting.insert(0, child.left)

    def _take(self, child, line):
        name = line.get("check")
        if name is None:
            return
        if "case" in line:
            cases = self._cases.setdefault(name, {})
            cases[line["case"]] = line
        elif line["status"] == "running":
            child.since = time.monotonic()
        elif line["status"] == "done":
            self._finish(child, name)

    def _finish(self, child, name, reason=None):
        cases = list(self._cases.get(name, {}).values())
        if reason is not None:
            stuck = [c for c in cases if c["status"] == "running"]
            if not stuck:
                stuck = [{"check": name, "case": "start"}]
                cases += stuck
            stuck[0].update(status="failed", found=reason)
        result = {
            "check": name,
            **outcome_of(cases),
            "seconds": round(time.monotonic() - child.since, 1),
            "cases": cases,
        }
        if result["status"] == "failed":
            result["output"] = child.last_words
        child.left.remove(name)
        child.has_finished = True
        child.since = time.monotonic()
        self._show(result)


def outcome_of(cases):
    """The status of a check, and in words what its cases have found."""
    by_status = {
        status: [case for case in cases if case["status"] == status]
        for status in ("ok", "failed", "skipped")
    }
    failed = by_status["failed"]
    if failed:
        found = "; ".join(f"{c['case']}: {c['found']}" for c in failed[:3])
        if len(failed) > 3:
            found += f"; and {len(failed) - 3} more"
        found = f"{len(failed)} of {len(cases)} cases: {found}"
        return {"status": "failed", "found": found}
    told = [c for c in cases if c.get("found")]
    found = "; ".join(
        c["found"] if len(told) == 1 else f"{c['case']}: {c['found']}"
        for c in told
    )
    if by_status["ok"]:
        count = len(by_status["ok"])
        number = f"{count} case{'s' * (count > 1)}"
        return {
            "status": "ok",
            "found": ". ".join(filter(None, (number, found))),
        }
    return {"status": "skipped", "found": found}


def gpu_memory():
    """Megabytes that are free on the fullest GPU, or None."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run(
            [
                program,
                "--query-gpu=memory.free",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        return min(int(line) for line in said.split("\n") if line.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def memory_limit(free, jobs, num_parts=2):
    """Megabytes for each part of a GPU that `jobs` processes share."""
    for_arrays = 0.9 * (free or _ASSUMED_MEMORY) - jobs * _CONTEXT_MEMORY
    return max(_SMALLEST_LIMIT, int(for_arrays / jobs / num_parts))


def default_jobs(kind, free):
    """How many checks run at once, as cores and memory allow."""
    jobs = min(os.cpu_count() or 1, 16)
    if kind == "GPU":
        room = (free or _ASSUMED_MEMORY) / (
            _CONTEXT_MEMORY + 2 * _SMALLEST_LIMIT
        )
        jobs = min(jobs, math.floor(0.9 * room))
    return max(1, jobs)


def why_no_gpu(software, is_cuda_build, output):
    """What is known of why TensorFlow sees no GPU, a list of sentences."""
    reasons = [f"TensorFlow {software.get('TensorFlow')} sees no GPU."]
    if not is_cuda_build:
        reasons.append(
            "It was built without CUDA: install tf_regtopk[and-cuda], or "
            "tensorflow[and-cuda], and not tensorflow-cpu beside it."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        reasons.append(
            f"CUDA_VISIBLE_DEVICES={visible!r} names the GPUs that a process "
            "may see; empty or -1 hides all."
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        reasons.append(
            f"The driver's library cannot be loaded: {error}. Is the NVIDIA "
            "driver installed, and the container started with --gpus=all?"
        )
    program = shutil.which("nvidia-smi")
    if program is None:
        reasons.append("There is no nvidia-smi.")
    else:
        said = subprocess.run(
            [program, "-L"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        reasons.append(
            f"nvidia-smi -L: {(said.stdout + said.stderr).strip()[:500]}"
        )
    told = [line for line in output if any(text in line for text in _TELLING)]
    # Without what stands before the message: level, time, process.
    reasons += [
        f"TensorFlow: {line.split('] ', 1)[-1]}" for line in dict.fromkeys(told)
    ]
    return reasons


def line_of(result):
    """A result as a line of the table."""
    status = {"failed": "FAILED"}.get(result["status"], result["status"])
    return (
        f"{status:8}{result['check']:16}{result['seconds']:6.1f} s  "
        f"{result['found']}"
    )


def define_flags():
    """Defines the command's flags."""
    flags.DEFINE_enum(
        "device_type",
        "auto",
        ["auto", "GPU", "CPU"],
        "What to run on. auto: GPUs where TensorFlow sees one.",
    )
    flags.DEFINE_list(
        "checks",
        None,
        f"Only these, of {', '.join(selftest_checks.CHECKS)}.",
    )
    flags.DEFINE_enum(
        "workers",
        "2",
        ["0", "2"],
        "0 leaves out the checks in which two processes train together.",
    )
    flags.DEFINE_boolean("quick", False, "Fewer cases of fewer checks.")
    flags.DEFINE_integer(
        "size",
        None,
        "Entries of the gradient of the step that is timed. Defaults to 25.6 "
        "million on GPUs, 1 million on CPUs.",
        lower_bound=10_000,
    )
    flags.DEFINE_integer(
        "jobs",
        None,
        "Processes at a time. Defaults to the number of cores, at most 16, and "
        "on a GPU as its memory allows.",
        lower_bound=1,
    )
    flags.DEFINE_float("limit_seconds", 200.0, "Of one check.", lower_bound=1.0)
    flags.DEFINE_string("output", "selftest.json", "The file of all results.")


def batches_of(names, is_quick, jobs):
    """Lists of checks for a process each.

    Where there are many cores, each check has a process of its own. Else some
    share one, because to start it takes as long as many a check.
    """
    alone = [name for name in names if name in selftest_checks.ALONE]
    names = [name for name in names if name not in alone]
    # Those wait for much of their time.
    names.sort(key=lambda name: name not in selftest_checks.OF_WORKERS)
    num_batches = min(len(names), jobs if is_quick else 2 * jobs)
    batches = [names[i::num_batches] for i in range(num_batches)]
    return batches + [[name] for name in alone]


def _end(number, frame):
    """Ends as after Ctrl-C, with all processes that were started."""
    del frame
    sys.exit(128 + number)


def main(argv):
    """Prints the table, and returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}", USAGE)
    args = flags.FLAGS
    names = args.checks or list(
        selftest_checks.QUICK if args.quick else selftest_checks.CHECKS
    )
    if args.workers == "0":
        names = [n for n in names if n not in selftest_checks.OF_WORKERS]
    unknown = set(names) - set(selftest_checks.CHECKS)
    if unknown:
        raise app.UsageError(
            f"`--checks` must be of {', '.join(selftest_checks.CHECKS)}. "
            f"Received: {', '.join(sorted(unknown))}",
            USAGE,
        )
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory() as folder:
        report = _run(args, names, pathlib.Path(folder))
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    return report["exit_status"]


def _run(args, names, folder):
    started = time.monotonic()
    results = []

    def show(result):
        results.append(result)
        print(line_of(result), flush=True)

    environ = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_FORCE_GPU_ALLOW_GROWTH": os.environ.get(
            "TF_FORCE_GPU_ALLOW_GROWTH", "true"
        ),
    }
    if args.device_type == "CPU":
        environ["CUDA_VISIBLE_DEVICES"] = "-1"
    settings = {
        "kind": args.device_type,
        "memory_limit": _SMALLEST_LIMIT,
        "quick": args.quick,
        "size": args.size or 1_000_000,
        "worker_seconds": 0.8 * args.limit_seconds,
    }
    # The first process says what there is, while it goes on.
    first = Child(
        ["environment"],
        folder,
        settings,
        {
            **environ,
            # Says what it misses.
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "dso_loader=3",
        },
    )
    free = gpu_memory()
    try:
        found = _first_words(first, args.limit_seconds)
    except BaseException:
        first.end()
        raise
    if found is None:
        first.end()
        show(
            {
                "check": "environment",
                "status": "failed",
                "seconds": round(time.monotonic() - started, 1),
                "found": " | ".join(first.last_words[-3:]) or "no answer",
            }
        )
        return {"exit_status": FAILED, "checks": results}
    gpus, software = found["gpus"], found["software"]
    kind = args.device_type
    if kind == "auto":
        kind = "GPU" if gpus else "CPU"
    report = {"device_type": kind, "gpus": gpus, "software": software}
    if kind == "GPU" and not gpus:
        first.popen.wait()
        lines = first.stderr.read_text("utf-8", "replace").splitlines()
        reasons = why_no_gpu(software, found["is_cuda_build"], lines)
        print("\n".join(reasons), flush=True)
        return {**report, "exit_status": NO_GPU, "reasons": reasons}
    jobs = args.jobs or default_jobs(kind, free)
    if kind == "GPU":
        settings["size"] = args.size or 25_600_000
        what = ", ".join(gpus)
    else:
        environ["CUDA_VISIBLE_DEVICES"] = "-1"
        what = f"CPU, {os.cpu_count()} cores"
    settings["kind"] = kind
    print(f"{what}; up to {jobs} checks at a time", flush=True)

    def start(batch):
        shared = 1 if selftest_checks.ALONE & set(batch) else jobs
        limit = memory_limit(free, shared)
        return Child(
            batch, folder, {**settings, "memory_limit": limit}, environ
        )

    names = [name for name in names if name != "environment"]
    run = Run(
        batches_of(names, args.quick, jobs),
        selftest_checks.ALONE,
        jobs,
        args.limit_seconds,
        start,
        show,
    )
    run.add(first)
    run.wait()
    failed = [r["check"] for r in results if r["status"] == "failed"]
    seconds = round(time.monotonic() - started, 1)
    print(
        f"{len(results) - len(failed)} of {len(results)} checks passed in "
        f"{seconds} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
        + f". Details: {args.output}",
        flush=True,
    )
    order = list(selftest_checks.CHECKS)
    return {
        **report,
        "exit_status": FAILED if failed else PASSED,
        "seconds": seconds,
        "jobs": jobs,
        "checks": sorted(results, key=lambda r: order.index(r["check"])),
    }


def _first_words(child, limit):
    """The first thing that a process reports, None if it reports nothing."""
    while True:
        ended = child.popen.poll() is not None
        data = child.output.read_bytes()
        if b"\n" in data:
            return json.loads(data.splitlines()[0])
        if ended or time.monotonic() - child.since > limit:
            return None
        time.sleep(0.05)


def _parse(argv):
    """As absl does, but with the exit status of a wrong argument."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"{error}\nSee --help.", file=sys.stderr)
        sys.exit(USAGE)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=_parse)
