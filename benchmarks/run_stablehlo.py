r"""Times the programs of export_stablehlo.py by JAX, on an accelerator.

Needs jax and numpy only. Times are medians, in passes over the gradient at the
device's own copy bandwidth: one pass copies J floats. Uses internals of JAX
(tried with 0.10).

    python benchmarks/run_stablehlo.py stablehlo
"""

import json
import pathlib
import statistics
import sys
import time

import jax
from jax._src import xla_bridge
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client
from jaxlib.mlir import ir
import numpy as np

ROUNDS = 20


def load(path):
    """A function of device arrays that runs the program in the file."""
    backend = xla_bridge.get_backend()
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(path.read_text("utf-8"))
    executable = backend.compile_and_load(
        module,
        xla_client.DeviceList(tuple(backend.local_devices()[:1])),
        xla_client.CompileOptions(),
    )

    def run(arguments):
        results = executable.execute_sharded(arguments)
        outputs = results.disassemble_into_single_device_arrays()
        return [shards[0] for shards in outputs]

    return run


def make_arguments(program, rng):
    """Arrays in which indices are valid, rising, and each there once."""
    size, arrays = program["size"], []
    for dtype, shape in program["arguments"]:
        if dtype == "float32":
            array = rng.standard_normal(shape, np.float32)
        elif shape and shape[-1] < size:
            stretch = size // shape[-1]
            array = np.arange(shape[-1]) * stretch + rng.integers(
                stretch, size=shape
            )
        else:
            array = rng.integers(2**30, size=shape)
        arrays.append(jax.device_put(np.asarray(array, dtype)))
    return arrays


def check(program, arguments, outputs):
    """Compares what was selected with NumPy's."""
    if program["name"] == "selection":
        magnitudes = np.abs(np.asarray(arguments[0]))
    elif program["name"] == "RegTopK step":
        error, g, indices, one_plus_delta = map(np.asarray, arguments[:4])
        magnitudes = np.abs(error + g)
        magnitudes[indices] *= np.tanh(np.abs(one_plus_delta) / 4)
    else:
        return
    selected = np.asarray(outputs[0])
    assert (np.diff(selected) > 0).all()
    k = len(selected)
    expected = np.partition(magnitudes, -k)[-k:].astype(np.float64).sum()
    actual = magnitudes[selected].astype(np.float64).sum()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def seconds_of(run, arguments):
    start = time.perf_counter()
    jax.block_until_ready(run(arguments))
    return time.perf_counter() - start


def main(directory):
    directory = pathlib.Path(directory)
    rng = np.random.default_rng(0)
    index = json.loads((directory / "index.json").read_text("utf-8"))
    device = jax.devices()[0].device_kind
    copy = jax.jit(lambda x: x + 1)
    results = []
    for program in index:
        run = load(directory / program["file"])
        arguments = make_arguments(program, rng)
        gradient = jax.numpy.ones(program["size"])
        check(program, arguments, run(arguments))
        copies, times = [], []
        for r in range(ROUNDS + 2):
            copies.append(seconds_of(copy, gradient))
            times.append(seconds_of(run, arguments))
            if r >= 2 and sum(times) > 30:
                break
        copy_seconds = statistics.median(copies[2:])
        result = {
            **{key: program[key] for key in ("name", "size", "density")},
            "device": device,
            "jax": jax.__version__,
            "milliseconds": 1e3 * statistics.median(times[2:]),
            "passes": statistics.median(times[2:]) / copy_seconds,
            "copy_gigabytes_per_second": 8e-9 * program["size"] / copy_seconds,
        }
        results.append(result)
        print(
            f"J={result['size']:>10} density={result['density']:<6g} "
            f"{result['name']:16} {result['milliseconds']:9.3f} ms "
            f"{result['passes']:8.2f} passes",
            flush=True,
        )
    path = directory / "summary.json"
    path.write_text(json.dumps({"results": results}, indent=2), "utf-8")
    print(f"{device}, JAX {jax.__version__}. Wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
