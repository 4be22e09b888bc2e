"""The way in which this process was started."""

import sys

_LAUNCHER = "tf_regtopk.run"


def launcher() -> bool:
    """Returns whether it is `python -m tf_regtopk.run`, being imported."""
    # Python puts the script in place of "-m" once it has found the module,
    # for which it imports the package.
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return False
    module = sys.orig_argv.index("-m") + 1
    return sys.orig_argv[module : module + 1] == [_LAUNCHER]
