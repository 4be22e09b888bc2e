"""The benchmarks run, on small inputs; what they measure is not tested."""

import json

import fork_server
import pytest

SIZES = (1000, 140001)
EXPORT = "accelerators.export_stablehlo"


def run(benchmark, output_dir, *args):
    args = [*args, f"--output_dir={output_dir}"]
    result = fork_server.run_one(f"benchmarks.{benchmark}", args)
    assert result.returncode == 0, result.stderr


SHARED = [f"--sizes={','.join(map(str, SIZES))}", "--densities=0.01"]


@pytest.mark.parametrize(
    "benchmark, methods",
    [
        (
            "kernels.selection",
            {"F", "tf_regtopk", "tf_regtopk, by variable", "tf.math.top_k"},
        ),
        (
            "kernels.codecs",
            {"F", "golomb, encode", "natural, decode", "raw, encode"},
        ),
        ("kernels.flatten", {"F", "all in XLA", "joined before"}),
        ("step.parts", {"F", "step, RegTopK", "sum of 8", "flatten", "split"}),
    ],
)
def test_speed(benchmark, methods, tmp_path):
    run(benchmark, tmp_path, *SHARED, "--rounds=2", "--warm_up=1")
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    measured = {(r["size"], r["method"]) for r in summary["results"]}
    assert measured >= {(size, name) for size in SIZES for name in methods}
    for result in summary["results"]:
        assert result["milliseconds"] > 0
    assert (tmp_path / "figure.png").exists()


def test_exported_programs_do_not_hold_the_gradient(tmp_path):
    """They are sent to another machine, and compiled there."""
    run(EXPORT, tmp_path, *SHARED)
    run(EXPORT, tmp_path / "cpu", *SHARED, "--compile_for=CPU")
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    for program in index:
        if program["name"] == "selection":
            texts = [
                (folder / program["file"]).read_text("utf-8")
                for folder in (tmp_path, tmp_path / "cpu")
            ]
            assert texts[0] != texts[1]
    assert {program["size"] for program in index} == set(SIZES)
    for program in index:
        text = (tmp_path / program["file"]).read_text("utf-8")
        assert f"tensor<{program['size']}x" in text
        if program["size"] == max(SIZES):
            assert len(text) < 8 * max(SIZES)  # Hexadecimal, 4 bytes each.


def test_programs_of_a_step_are_exported(tmp_path):
    """With the variables, where the sum writes over them."""
    names = ["send", "decode", "settle"]
    run(
        EXPORT,
        tmp_path,
        "--sizes=140001",
        "--densities=0.01",
        f"--programs={','.join(names)}",
        "--values=natural",
    )
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    assert [program["name"] for program in index] == names
    for program in index:
        assert (tmp_path / program["file"]).exists()
    sum_program = index[-1]
    first = sum_program["reused"]
    # The error, and what RegTop-k remembers.
    assert sum_program["arguments"][first:] == [
        ["float32", [140001]],
        ["float32", [1400]],  # Indices, held as such.
        ["float32", [1400]],
    ]


@pytest.mark.slow
def test_bytes_on_a_socket(tmp_path):
    """The report says what crosses the interface, but for little framing."""
    run(
        "step.wire_bytes",
        tmp_path,
        "--size=2000000",
        "--densities=0.05",
        "--codecs=golomb+ternary",
        "--steps=2",
    )
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    [r] = summary["results"]
    counted = r["counted_bytes"] - r["packet_header_bytes"]
    assert counted > r["reported_bytes"]
    if summary["has_own_network"]:
        assert counted < 1.05 * r["reported_bytes"]


def test_fit(tmp_path):
    run("step.fit", tmp_path, "--epochs=1", "--units=5")
    results = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert set(results) == {"SGD", "RegTopK", "dense"}
    assert all(r["milliseconds"] > 0 for r in results.values())
