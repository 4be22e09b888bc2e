r"""Times the programs of export_stablehlo.py by JAX, on an accelerator.

Needs jax and numpy only. Times are medians over runs of several calls, in
passes over the gradient at the device's own copy bandwidth: one pass reads and
writes J floats.

    python benchmarks/with_jax/run_stablehlo.py stablehlo

`profile` after that prints the kernels as well.
"""

import collections
import concurrent.futures
import glob
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
from jax import numpy as jnp
import jax_program

ROUNDS = 15
# Seconds that the calls of a round take, so that starting them does not count.
ROUND_SECONDS = 0.02


def make_arguments(program, seed=0):
    """Arrays in which indices are valid, rising, and each there once."""
    size, arrays = program["size"], []
    for dtype, shape in program["arguments"]:
        seed += 1
        key = jax.random.key(seed)
        if dtype == "float32":
            array = jax.random.normal(key, shape, dtype)
        elif shape and shape[-1] < size:
            stretch = size // shape[-1]
            array = jnp.arange(shape[-1]) * stretch + jax.random.randint(
                key, shape, 0, stretch
            )
        else:
            array = jax.random.randint(key, shape, 0, 2**30)
        arrays.append(array.astype(dtype))
    return arrays


def check(program, arguments, outputs):
    """Whether exactly the k largest are selected, ties by position."""
    if program["name"] == "selection":
        magnitudes = jnp.abs(arguments[0])
    elif program["name"] == "RegTopK step":
        error, g, indices, one_plus_delta = arguments[:4]
        magnitudes = jnp.abs(error + g)
        # Rounded in another way than in the program, so only nearly the same.
        damping = jnp.tanh(jnp.abs(one_plus_delta) / 4)
        magnitudes = magnitudes.at[indices].multiply(damping)
    else:
        return
    selected = outputs[0]
    assert selected.shape == (program["k"],)
    assert (jnp.diff(selected) > 0).all() and selected[0] >= 0
    assert selected[-1] < program["size"]
    smallest = magnitudes[selected].min()
    left = magnitudes.at[selected].set(0)
    if program["name"] == "selection":
        assert left.max() <= smallest
        last = jnp.max(jnp.where(magnitudes[selected] == smallest, selected, 0))
        assert not (left[:last] == smallest).any()
    else:
        assert left.max() <= smallest * (1 + 1e-6)


def seconds_of(run, arguments, calls):
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        outputs = run(*arguments)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / calls


def calls_a_round(run, arguments):
    seconds_of(run, arguments, 1)
    seconds = seconds_of(run, arguments, 3)
    return max(1, int(ROUND_SECONDS / seconds))


def kernels(run, arguments, calls=10):
    """Microseconds a call of each kernel, and how often it runs, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds_of(run, arguments, calls)
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
        times, counts = collections.Counter(), collections.Counter()
        for plane in profile.planes:
            if "/device:GPU" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    times[event.name] += event.duration_ns / 1e3 / calls
                    counts[event.name] += 1 / calls
    return [(us, counts[name], name) for name, us in times.most_common()]


def main(directory, profile=False):
    directory = pathlib.Path(directory)
    index = json.loads((directory / "index.json").read_text("utf-8"))
    device = jax.devices()[0].device_kind
    copy = jax.jit(lambda x: x + 1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(
            pool.map(
                lambda program: jax_program.Program(
                    directory / program["file"]
                ),
                index,
            )
        )
    results = []
    for program, run in zip(index, programs, strict=True):
        arguments = make_arguments(program)
        gradient = jnp.ones(program["size"])
        check(program, arguments, run(*arguments))
        copies, times = [], []
        calls = calls_a_round(run, arguments)
        copy_calls = calls_a_round(copy, [gradient])
        for _ in range(ROUNDS):
            copies.append(seconds_of(copy, [gradient], copy_calls))
            times.append(seconds_of(run, arguments, calls))
            if sum(times) * calls > 5:
                break
        copy_seconds = statistics.median(copies)
        result = {
            **{key: program[key] for key in ("name", "size", "density")},
            "device": device,
            "jax": jax.__version__,
            "milliseconds": 1e3 * statistics.median(times),
            "passes": statistics.median(times) / copy_seconds,
            "fastest_passes": min(times) / copy_seconds,
            "slowest_passes": max(times) / copy_seconds,
            "copy_gigabytes_per_second": 8e-9 * program["size"] / copy_seconds,
        }
        results.append(result)
        print(
            f"J={result['size']:>10} density={result['density']:<6g} "
            f"{result['name']:16} {result['milliseconds']:9.3f} ms "
            f"{result['passes']:8.2f} passes",
            flush=True,
        )
        if profile:
            for us, count, name in kernels(run, arguments):
                print(f"    {us:9.1f} us {count:6.1f} x {name[:100]}")
    path = directory / "summary.json"
    path.write_text(json.dumps({"results": results}, indent=2), "utf-8")
    print(
        f"{device}, JAX {jax.__version__}, copies at "
        f"{results[-1]['copy_gigabytes_per_second']:.0f} GB/s. Wrote {path}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
