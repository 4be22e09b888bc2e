"""Types of the package, and of its public interface as users see it."""

import subprocess
import sys

import old_versions
import paths


def check_types(path, folder):
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
        + ["--ignore-missing-imports", "--allow-subclassing-any"]
        + ["--no-warn-return-any", f"--cache-dir={folder}", str(path)],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_user_code(tmp_path):
    result = check_types(
        paths.TESTS / "support" / "typed_user_code.py", tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr


@old_versions.needs_typed_numpy
def test_package(tmp_path):
    result = check_types(paths.ROOT / "tf_regtopk", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
