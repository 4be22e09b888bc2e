"""Types of the package, and of its public interface as users see it."""

import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def check_types(path, folder):
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
        + ["--ignore-missing-imports", "--allow-subclassing-any"]
        + ["--no-warn-return-any", f"--cache-dir={folder}", str(path)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_user_code(tmp_path):
    result = check_types(TESTS / "typed_user_code.py", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_package(tmp_path):
    result = check_types(TESTS.parent / "tf_regtopk", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
