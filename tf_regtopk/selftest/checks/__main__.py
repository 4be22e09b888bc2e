"""Runs `python -m tf_regtopk.selftest.checks`."""

import sys

from tf_regtopk.selftest import checks

if __name__ == "__main__":
    checks.main(sys.argv)
