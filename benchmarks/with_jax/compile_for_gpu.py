r"""Compiles the programs of export_stablehlo.py for a GPU, and counts kernels.

On a machine without a GPU. Needs, in an environment of its own,

    pip install absl-py jax==0.9.2 nvidia-cuda-nvcc nvidia-nvvm
    pip install --no-deps jax-cuda13-pjrt==0.9.2 jax-cuda13-plugin==0.9.2

    python benchmarks/with_jax/compile_for_gpu.py --programs_dir=step

`--deterministic` as well compiles as after `enable_op_determinism`.

The columns are those of `hlo_program.count`, and `temporary`: memory beside
arguments and results, in arrays of J floats. The first side of a branch is what
runs where the sample's bounds hold. Before a branch, and each round of a loop
of unknown length, the host asks the device which way to go.
"""

import importlib.util
import json
import os
import pathlib
import time

from absl import app
from absl import flags

# The CUDA libraries for the device itself are not there.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# Without a GPU XLA warns for each program that sorts may get slower.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hlo_program
from jax.experimental import topologies
import jax_program

# NVIDIA H100 SXM.
CHIP = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352000000000
  device_memory_size: 85899345920
}
dnn_version_info { major: 9 minor: 10 }
"""
BOOLEANS = {"true": True, "false": False}
COLUMNS = {
    "program": 16,
    "J": 11,
    "density": 8,
    "kernels": 8,
    "in all": 7,
    "scatters": 9,
    "sorts": 6,
    "branches": 9,
    "f64": 4,
    "temporary": 10,
    "seconds": 8,
    "loops": 30,
}


def define_flags():
    flags.DEFINE_string("programs_dir", "stablehlo", "Where the programs are.")
    flags.DEFINE_bool(
        "deterministic",
        False,
        "As TensorFlow compiles after "
        "tf.config.experimental.enable_op_determinism().",
    )
    flags.DEFINE_list(
        "xla_flags", [], "Others for XLA, such as xla_gpu_autotune_level=0."
    )
    flags.DEFINE_string(
        "hlo_dir", None, "Where XLA's final programs go, if anywhere."
    )


class Compiler:
    """XLA for a chip that is not there.

    Args:
        options: Dictionary of flags of XLA.
    """

    def __init__(self, options):
        [nvidia] = importlib.util.find_spec("nvidia").submodule_search_locations
        self._options = {
            "xla_gpu_cuda_data_dir": f"{nvidia}/cu13",
            # Nothing can be timed.
            "xla_gpu_autotune_level": "0",
            **options,
        }
        [self._device] = topologies.get_topology_desc(
            "", "cuda", target_config=CHIP, topology="1x1x1"
        ).devices

    def compile(self, path, reused=None):
        """A program, as an executable that cannot be run."""
        return jax_program.compile_file(
            path,
            self._device,
            self._device.client.compile,
            reused,
            self._options,
        )


def print_row(cells):
    print(
        "".join(f"{cells[name]!s:>{width}}" for name, width in COLUMNS.items()),
        flush=True,
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    directory = pathlib.Path(args.programs_dir)
    index = json.loads((directory / "index.json").read_text("utf-8"))
    options = dict(option.split("=", 1) for option in args.xla_flags)
    options = {k: BOOLEANS.get(v, v) for k, v in options.items()}
    if args.deterministic:
        options["xla_gpu_deterministic_ops"] = True
    compiler = Compiler(options)
    print_row({name: name for name in COLUMNS})
    for program in index:
        start = time.perf_counter()
        executable = compiler.compile(
            directory / program["file"], program.get("reused")
        )
        seconds = time.perf_counter() - start
        [module] = executable.hlo_modules()
        hlo = module.to_string()
        memory = executable.get_compiled_memory_stats().temp_size_in_bytes
        print_row(
            {
                "program": program["name"],
                "J": program["size"],
                "density": f"{program['density']:g}",
                **hlo_program.count(hlo),
                "temporary": f"{memory / 4 / program['size']:.2f}",
                "seconds": f"{seconds:.1f}",
            }
        )
        if args.hlo_dir:
            path = pathlib.Path(args.hlo_dir, program["file"] + ".hlo")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(hlo, "utf-8")


if __name__ == "__main__":
    define_flags()
    app.run(main)
