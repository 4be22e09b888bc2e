"""The self-test's command, whose processes have a fault in `LearnedShift`."""

import runpy
import sys

from tf_regtopk import selftest_processes

PROGRAM = """
import sys
import tensorflow as tf
from tf_regtopk import learned_shift, selftest_checks
def forget(self, local, indices, sent, step):
    return (local[0] * 0.5, *local[1:])
learned_shift.LearnedShift.update = forget
selftest_checks.main(sys.argv)
"""

if __name__ == "__main__":
    selftest_processes.COMMAND = (sys.executable, "-c", PROGRAM)
    runpy.run_module("tf_regtopk.selftest", run_name="__main__")
