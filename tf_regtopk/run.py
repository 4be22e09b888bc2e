"""Command: starts a script as several workers, see `launch/command.py`."""

import sys

from tf_regtopk.launch import command

if __name__ == "__main__":
    sys.exit(command.main())
