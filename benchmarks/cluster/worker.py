"""A worker of a benchmark between hosts: takes training steps when told to.

    python -m benchmarks.cluster.worker tensorflow '{"index": 0, ...}'

Commands are lines of JSON on standard input, and each is answered by one on
standard output. Between commands a worker waits, and takes no time from the
others. The same command reaches all workers of a kind, so that all take part
in the same collectives in the same order.
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import resource
import signal
import sys
import time
import traceback

from benchmarks.cluster import methods
from benchmarks.cluster import namespaces

# Traces, compiles, and lets PowerSGD begin, which it does after 5 steps.
_WARM_UP_STEPS = 8


def _study_worker(args):
    # Others need not wait for the data sets' library.
    from benchmarks.cluster import study_worker

    return study_worker.StudyWorker(args)


def _torch_study_worker(args):
    from benchmarks.cluster import study_worker

    return study_worker.TorchStudyWorker(args)


_KINDS = {
    "tensorflow": methods.TensorFlowWorker,
    "torch": methods.TorchWorker,
    "study": _study_worker,
    "torch_study": _torch_study_worker,
}


def take_steps(worker, method, first, lead_in, steps):
    """Takes steps of a method, and counts their time and traffic.

    Args:
        worker: What one of `_KINDS` makes.
        method: Name of the method.
        first: Number of the first step.
        lead_in: Steps before those that are timed: connections that were idle
            start slowly.
        steps: Timed steps.

    Returns:
        Dict: `seconds` of each timed step; bytes and packets that the interface
        sent in all of them, and seconds of a CPU that this process took, those
        before included.
    """
    seconds = []
    before = namespaces.sent_counters()
    cpu_before = _cpu_seconds()
    for number in range(first, first + lead_in + steps):
        start = time.perf_counter()
        loss = worker.step(method, number)
        seconds.append(time.perf_counter() - start)
    after = namespaces.sent_counters()
    cpu_after = _cpu_seconds()
    if not math.isfinite(loss):
        raise ValueError(f"The loss of {method} is {loss}.")
    return {
        "seconds": seconds[lead_in:],
        "sent_bytes": after[0] - before[0],
        "sent_packets": after[1] - before[1],
        "cpu_seconds": cpu_after - cpu_before,
        "counted_steps": lead_in + steps,
    }


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(kind, args, output):
    """Carries out commands until standard input ends."""
    worker = _KINDS[kind](args)
    versions = worker.versions | {"numpy": importlib.metadata.version("numpy")}
    print(json.dumps({"versions": versions}), file=output, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        method = command.get("method")
        answer = {}
        if command["do"] == "build":
            refusal = worker.can_run(method)
            if refusal is None:
                answer = worker.build(method, command["size"])
                for number in range(command.get("steps", _WARM_UP_STEPS)):
                    worker.step(method, number)
            else:
                answer = {"refusal": refusal}
        elif command["do"] == "steps":
            answer = take_steps(
                *(worker, method, command["first"]),
                *(command["lead_in"], command["steps"]),
            )
        elif command["do"] == "profile":
            with worker.profile(command["folder"]):
                for number in range(command["steps"]):
                    worker.step(method, number)
        elif command["do"] == "test":
            answer = {"accuracy": worker.accuracy(method)}
        elif command["do"] == "free":
            worker.free()
        if command["do"] != "steps":
            # Back to the system, for the other workers.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps(answer), file=output, flush=True)


def main(argv):
    # Ends with the process that started it, however that ends.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # What libraries print goes with the errors.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    status = 0
    try:
        serve(argv[1], json.loads(argv[2]), output)
    except BaseException:
        traceback.print_exc()
        status = 1
    # Not through TensorFlow's shutdown, which may wait for other workers.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv)
