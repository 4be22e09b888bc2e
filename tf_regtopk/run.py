"""Command: starts a script as several workers, see `launch/command.py`."""

import os
import sys

from tf_regtopk.launch import command


def _main() -> int:
    try:
        return command.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))


if __name__ == "__main__":
    status = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At a regular exit Python says goodbye to a rendezvous that may be gone.
    os._exit(status)
