"""The checks of `python -m tf_regtopk.selftest`, run in a process of their own.

    python -m tf_regtopk.selftest.checks SETTINGS

Each check is a generator of cases, `(name, function)`. A function returns its
findings as text, or None, and raises an error if something is wrong.
"""

from tf_regtopk.selftest.checks.process import main
from tf_regtopk.selftest.checks.process import run_check
from tf_regtopk.selftest.checks.process import summary_of
from tf_regtopk.selftest.checks.registry import ALONE
from tf_regtopk.selftest.checks.registry import CHECKS
from tf_regtopk.selftest.checks.registry import OF_WORKERS
from tf_regtopk.selftest.checks.registry import QUICK

__all__ = [
    "ALONE",
    "CHECKS",
    "OF_WORKERS",
    "QUICK",
    "main",
    "run_check",
    "summary_of",
]
