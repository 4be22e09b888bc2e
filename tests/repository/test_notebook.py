"""The notebook runs from top to bottom."""

import json

import fork_server
import paths

NOTEBOOK = paths.ROOT / "examples" / "tour.ipynb"


def test_the_notebook_runs():
    """With fewer epochs than for a reader."""
    program = paths.ROOT / "tests" / "support" / "run_notebook.py"
    result = fork_server.run_one(
        program, [NOTEBOOK, "EPOCHS = 8", "EPOCHS = 2"]
    )
    assert result.returncode == 0, result.stderr[-5000:]
    for name in ("dense", "RegTop-k", "learned shift"):
        [accuracy] = [
            float(line.removeprefix(name).split()[0])
            for line in result.stdout.splitlines()
            if line.startswith(name) and "of the test" in line
        ]
        assert accuracy > 0.3, name  # Of ten classes.
    assert "step 22 resumed" in result.stdout
    assert "entries selected" in result.stdout


def test_the_notebook_is_stored_without_results():
    """Which would be those of some machine, and differ in each run."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
