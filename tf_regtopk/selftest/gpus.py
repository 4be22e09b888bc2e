"""Facts about a machine's GPUs without TensorFlow, for the self-test."""

from collections.abc import Mapping
from collections.abc import Sequence
import ctypes
import math
import os
import subprocess
from typing import Literal

# A GPU counts as having so many megabytes if nobody can ask for its size.
_ASSUMED_MEMORY = 8000
# A process occupies so many megabytes of a GPU beside its arrays.
_CONTEXT_MEMORY = 1200
SMALLEST_LIMIT = 500
# TensorFlow writes these texts if it cannot use a GPU.
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


def driver_error() -> str | None:
    """Explains why the library of NVIDIA's driver cannot be loaded, or None."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None


def gpu_memory() -> int | None:
    """Returns the megabytes that are free on the fullest GPU, or None."""
    try:
        return min(map(int, _ask("memory.free")), default=None)
    except ValueError:
        return None


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, or None."""
    return next(iter(_ask("driver_version")), None)


def _ask(what: str) -> list[str]:
    """Asks nvidia-smi about each GPU; an empty list if it does not answer."""
    status, said = _nvidia_smi(
        f"--query-gpu={what}", "--format=csv,noheader,nounits"
    )
    if status != 0:
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def _nvidia_smi(*args: str) -> tuple[int | None, str]:
    """Runs nvidia-smi, returns `(exit status or None, output)`."""
    try:
        process = subprocess.run(
            ["nvidia-smi", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    return process.returncode, process.stdout


def memory_limit(free: int | None, jobs: int, num_parts: int = 2) -> int:
    """Megabytes for each part of a GPU that `jobs` processes share."""
    for_arrays = 0.9 * (free or _ASSUMED_MEMORY) - jobs * _CONTEXT_MEMORY
    return max(SMALLEST_LIMIT, int(for_arrays / jobs / num_parts))


def default_jobs(kind: Literal["GPU", "CPU"], free: int | None) -> int:
    """Number of checks at a time that cores and memory allow."""
    jobs = min(os.cpu_count() or 1, 16)
    if kind == "GPU":
        room = (free or _ASSUMED_MEMORY) / (
            _CONTEXT_MEMORY + 2 * SMALLEST_LIMIT
        )
        jobs = min(jobs, math.floor(0.9 * room))
    return max(1, jobs)


def why_no_gpu(
    software: Mapping[str, str], is_cuda_build: bool, output: Sequence[str]
) -> list[str]:
    """Explains why TensorFlow sees no GPU.

    Args:
        software: The versions in use, by name.
        is_cuda_build: True if TensorFlow was built for CUDA.
        output: Lines that TensorFlow has written to standard error.

    Returns:
        List of sentences.
    """
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
    if error := driver_error():
        reasons.append(
            f"The driver's library cannot be loaded: {error}. Is the NVIDIA "
            "driver installed, and the container started with --gpus=all?"
        )
    _, said = _nvidia_smi("-L")
    reasons.append(f"nvidia-smi -L: {said.strip()[:500]}")
    # Level, time and process are cut off, because only the message matters.
    told = [
        f"TensorFlow: {line.split('] ', 1)[-1]}"
        for line in output
        if any(text in line for text in _TELLING)
    ]
    return [*reasons, *dict.fromkeys(told)]
