"""The self-test's command, whose processes have a fault in `LearnedShift`."""

import runpy
import sys

from tf_regtopk.selftest import processes

PROGRAM = """
import sys
import tensorflow as tf
from tf_regtopk.error_feedback import learned_shift
from tf_regtopk.selftest import checks
def forget(self, local, indices, sent, total, step):
    return (local[0] * 0.5, *local[1:])
learned_shift.LearnedShift.update = forget
checks.main(sys.argv)
"""

if __name__ == "__main__":
    processes.COMMAND = (sys.executable, "-c", PROGRAM)
    runpy.run_module("tf_regtopk.selftest", run_name="__main__")
