"""The benchmarks run, on small inputs; what they measure is not tested.

The commands of the claims, in `benchmarks/README.md`, have the files and flags
that they name.
"""

import ast
import functools
import itertools
import json
import re
import shlex

import fork_server
import old_versions
import paths
import pytest
import tensorflow as tf

from benchmarks.kernels import fallback_rate
import tf_regtopk

SIZES = (1000, 140001)
EXPORT = "accelerators.export_stablehlo"


def run(benchmark, output_dir, *args):
    args = [*args, f"--output_dir={output_dir}"]
    result = fork_server.run_one(f"benchmarks.{benchmark}", args)
    assert result.returncode == 0, result.stderr


def shared(sizes=SIZES):
    return [f"--sizes={','.join(map(str, sizes))}", "--densities=0.01"]


@pytest.mark.parametrize(
    "benchmark, methods",
    [
        pytest.param(
            "kernels.selection",
            {"F", "tf_regtopk", "tf_regtopk, by variable", "tf.math.top_k"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "kernels.codecs",
            {"F", "golomb, encode", "natural, decode", "raw, encode"},
            marks=pytest.mark.slow,
        ),
        ("kernels.flatten", {"F", "all in XLA", "joined before"}),
        pytest.param(
            "step.parts",
            {"F", "step, RegTopK", "sum of 8", "flatten", "split"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_speed(benchmark, methods, tmp_path):
    # A whole step takes long to compile.
    sizes = SIZES[-1:] if benchmark == "step.parts" else SIZES
    run(benchmark, tmp_path, *shared(sizes), "--rounds=2", "--warm_up=1")
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    measured = {(r["size"], r["method"]) for r in summary["results"]}
    assert measured >= {(size, name) for size in sizes for name in methods}
    for result in summary["results"]:
        assert result["milliseconds"] > 0
    assert (tmp_path / "figure.png").exists()


@old_versions.needs_stablehlo
def test_exported_programs_do_not_hold_the_gradient(tmp_path):
    """They are sent to another machine, and compiled there."""
    run(EXPORT, tmp_path, *shared())
    run(EXPORT, tmp_path / "cpu", *shared(), "--compile_for=CPU")
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


@old_versions.needs_stablehlo
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


@pytest.mark.slow
def test_fit(tmp_path):
    run("step.fit", tmp_path, "--epochs=1", "--units=5")
    results = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert set(results) == {
        "SGD",
        "RegTopK",
        "RegTopK, Monitor",
        "telemetry",
        "telemetry, Monitor",
        "dense",
    }
    assert all(r["milliseconds"] > 0 for r in results.values())


@pytest.mark.parametrize("suffices", [True, False])
def test_samples_that_fail_are_counted(suffices, monkeypatch):
    monkeypatch.setattr(
        fallback_rate.selection,
        "sample_suffices",
        lambda scores, groups, step: tf.constant(suffices),
    )
    worker = fallback_rate.Worker(tf_regtopk.TopK(0.5), size=4)
    fallbacks = [worker.select(tf.range(4.0), step) for step in range(3)]
    assert sum(fallbacks) == (0 if suffices else 3)


# ----- Where the programs are, and which claims they belong to -----

PROGRAMS = [
    path
    for path in paths.BENCHMARKS.rglob("*.py")
    if "__main__" in path.read_text("utf-8")
]
# `cluster/step.py` starts these.
PARTS = [paths.BENCHMARKS / "cluster" / f for f in ("traffic.py", "worker.py")]
CLAIMS = re.findall(
    r"^\| (?!claim|---)([^|]*) \| ([^|]*) \| ([^|]*) \|$",
    (paths.BENCHMARKS / "README.md").read_text("utf-8"),
    re.M,
)
COMMANDS = sorted(
    {command for *_, cell in CLAIMS for command in re.findall("`(.*?)`", cell)}
)


def program_and_flags(command):
    """The file that a command runs, and the names of the flags it gives."""
    words = shlex.split(command)
    words = list(itertools.dropwhile(lambda w: re.match("[A-Z_]+=", w), words))
    if words[1:3] == ["-m", "tf_regtopk.run"]:
        # The flags of the launcher come before the script.
        words = [
            "python",
            *itertools.dropwhile(lambda w: ".py" not in w, words),
        ]
    if words[:2] == ["python", "-m"]:
        path = paths.ROOT / f"{words[2].replace('.', '/')}.py"
    else:
        assert words[0] in ("python", "pytest")
        path = paths.ROOT / words[1]
    flags = [w[2:].partition("=")[0] for w in words if w.startswith("--")]
    return path, flags


@functools.cache
def imports_of(path):
    """Modules that a file names in its imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def flags_of(path, seen=()):
    """Names of the flags that a file defines, or a benchmark or example of it.

    A flag is the first argument of a function that defines one, or a key of
    `_FLAGS`.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(
                func=ast.Attribute(attr=function),
                args=[ast.Constant(value=str(name)), *_],
            ) if function.startswith("DEFINE_") or function == "add_argument":
                names.add(name.removeprefix("--"))
                if function.startswith("DEFINE_bool"):
                    names.add(f"no{name}")
            case (
                ast.Assign(targets=[ast.Name(id="_FLAGS")])
                | ast.AnnAssign(target=ast.Name(id="_FLAGS"))
            ):
                keys = node.value.keys
                names |= {key.value for key in keys}
    for module in imports_of(path):
        file = f"{module.replace('.', '/')}.py"
        studies = paths.EXAMPLES / "studies"
        for folder in (path.parent, paths.EXAMPLES, studies, paths.ROOT):
            other = folder / file
            is_ours = not module.startswith("tf_regtopk") and other.is_file()
            if is_ours and other not in (path, *seen):
                names |= flags_of(other, (path, *seen))
    return names


def test_claims_are_found():
    assert len(CLAIMS) > 20
    assert flags_of(paths.BENCHMARKS / "kernels" / "flatten.py") >= {
        "sizes",
        "threads",
    }
    assert "peers" not in flags_of(paths.BENCHMARKS / "kernels" / "flatten.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_a_claim(command):
    path, flags = program_and_flags(command)
    assert path.is_file()
    assert set(flags) <= flags_of(path)


def test_every_benchmark_has_a_claim():
    named = {program_and_flags(command)[0] for command in COMMANDS}
    assert {path for path in named if paths.BENCHMARKS in path.parents} == {
        path for path in PROGRAMS if path not in PARTS
    }


@pytest.mark.parametrize("claim, sections, commands", CLAIMS)
def test_section_of_a_claim(claim, sections, commands):
    links = re.findall(r"\]\((.*?)#(.*?)\)", sections)
    assert links and "`" in commands
    for file, fragment in links:
        text = (paths.BENCHMARKS / file).read_text("utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        assert fragment in {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in headings
        }


def test_benchmarks_that_are_mentioned():
    root = paths.ROOT
    for path in [*root.glob("*.md"), *root.glob("[!.]*/**/*.[mp][dy]")]:
        text = path.read_text("utf-8")
        for file in re.findall(r"\bbenchmarks/[\w/]+\.py", text):
            assert (root / file).is_file(), (path, file)
        for module in re.findall(r"-m (benchmarks(?:\.\w+)+)", text):
            file = f"{module.replace('.', '/')}.py"
            assert (root / file).is_file(), (path, module)


@pytest.mark.parametrize(
    "path",
    sorted((paths.BENCHMARKS / "with_jax").glob("*.py")),
    ids=lambda p: p.name,
)
def test_programs_for_machines_without_tensorflow(path):
    """They import each other, and nothing else of the repository."""
    tops = {module.partition(".")[0] for module in imports_of(path)}
    assert not tops & {"benchmarks", "keras", "tensorflow", "tf_regtopk"}
    assert not tops & {p.stem for p in paths.EXAMPLES.rglob("*.py")}
