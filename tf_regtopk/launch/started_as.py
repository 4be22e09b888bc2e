"""The way in which this process was started."""

import sys

# The launcher and the advice do not train.
_WITHOUT_TENSORFLOW = ("tf_regtopk.advise", "tf_regtopk.run")


def command_without_tensorflow() -> bool:
    """Returns whether a command that needs no TensorFlow is being imported.

    Such are `python -m tf_regtopk.advise` and `python -m tf_regtopk.run`.
    """
    # Python puts the script in place of "-m" once it has found the module,
    # for which it imports the package.
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return False
    module = sys.orig_argv.index("-m") + 1
    return "".join(sys.orig_argv[module : module + 1]) in _WITHOUT_TENSORFLOW
