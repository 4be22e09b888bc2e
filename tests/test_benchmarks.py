"""The benchmarks run, on small inputs; what they measure is not tested."""

import json
import pathlib
import subprocess
import sys

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def test_selection(tmp_path):
    subprocess.run(
        [
            sys.executable,
            BENCHMARKS / "selection.py",
            "--sizes=1000,140001",
            "--densities=0.01",
            "--rounds=2",
            f"--output_dir={tmp_path}",
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    measured = {(r["size"], r["method"]) for r in summary["results"]}
    assert measured == {
        (size, method)
        for size in (1000, 140001)
        for method in ("F", "tf_regtopk", "tf.math.top_k", "np.argpartition")
    }
    for result in summary["results"]:
        assert result["milliseconds"] > 0
