"""Runs `python -m tf_regtopk.selftest`."""

from absl import app
from absl import flags

from tf_regtopk.selftest import command

if __name__ == "__main__":
    command.define_flags()
    # `--help` lists the key flags of the main module only.
    flags.adopt_module_key_flags(command)
    app.run(command.main, flags_parser=command.parse)
