"""Runs `python -m tf_regtopk.selftest`."""

from absl import app

from tf_regtopk.selftest import command

if __name__ == "__main__":
    command.define_flags()
    app.run(command.main, flags_parser=command.parse)
