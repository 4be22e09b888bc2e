"""StableHLO run by JAX, through internals of it (tried with 0.9.2, 0.11)."""

from jax._src import xla_bridge
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client
from jaxlib.mlir import ir


class Program:
    """A function of device arrays, compiled.

    Args:
        path: File of the program.
        reused: Number of the first one of the last arguments, which the results
            take the places of; None if there are none.
    """

    def __init__(self, path, reused=None):
        backend = xla_bridge.get_backend()
        device = backend.local_devices()[0]
        self._executable = compile_file(
            path, device, backend.compile_and_load, reused
        )

    def __call__(self, *arguments):
        results = self._executable.execute_sharded(arguments)
        outputs = results.disassemble_into_single_device_arrays()
        return [shards[0] for shards in outputs]


def compile_file(path, device, compile_, reused=None, xla_flags=()):
    """Compiles the program in a file.

    Args:
        path: The file.
        device: What to compile for.
        compile_: The method of the device's client that does.
        reused: As of `Program`.
        xla_flags: Dictionary of flags of XLA.

    Returns:
        What `compile_` does.
    """
    options = xla_client.CompileOptions()
    options.env_option_overrides = list(dict(xla_flags).items())
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(path.read_text("utf-8"))
        if reused is not None:
            _reuse(module, reused)
        return compile_(module, xla_client.DeviceList((device,)), options)


def _reuse(module, first):
    """Lets results, in their order, be written over arguments from `first`."""
    [main] = [
        operation
        for operation in module.body.operations
        if ir.StringAttr(operation.attributes["sym_name"]).value == "main"
    ]
    number_type = ir.IntegerType.get_signless(32)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.get(
                {"tf.aliasing_output": ir.IntegerAttr.get(number_type, i)}
                if i >= 0
                else {}
            )
            for i in range(-first, len(main.type.inputs) - first)
        ]
    )
