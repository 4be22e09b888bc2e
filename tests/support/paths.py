"""Folders of the repository."""

import pathlib

TESTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
