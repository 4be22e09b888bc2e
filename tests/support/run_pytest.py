"""What Bazel runs as each test's main program: pytest on the given files."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-n", "0", *sys.argv[1:]]))
