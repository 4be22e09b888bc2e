"""The public namespace, and that BUILD, README and CI fit the code."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import tf_regtopk

ROOT = pathlib.Path(tf_regtopk.__file__).parent.parent

PUBLIC = {
    "Accumulate",
    "BFloat16",
    "Backup",
    "Codec",
    "CompressedDownlink",
    "Dense",
    "DensityWarmup",
    "EF21",
    "ErrorFeedback",
    "Float16",
    "Float32",
    "LearnedShift",
    "LossScaleOptimizer",
    "MultiWorkerMirroredStrategy",
    "Natural",
    "NoFeedback",
    "RandomK",
    "RegTopK",
    "ScaledSign",
    "SparsifiedOptimizer",
    "Sparsifier",
    "TopK",
    "Uniform",
    "ValueCodec",
    "WireReport",
    "__version__",
    "load_scope",
    "worker_path",
}
MODULES = {path.stem for path in (ROOT / "tf_regtopk").glob("[a-z]*.py")}


def test_public_namespace():
    assert set(tf_regtopk.__all__) == PUBLIC
    visible = {name for name in vars(tf_regtopk) if not name.startswith("_")}
    # Modules show once they have been imported.
    assert visible - MODULES == PUBLIC - {"__version__"}


def test_version_needs_no_tensorflow():
    program = (
        "import runpy, sys; "
        "runpy.run_path('tf_regtopk/version.py'); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60
    )


def imported_modules(path):
    """The modules of the package, and of the same folder, that a file needs."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module == "tf_regtopk":
                names |= {f"tf_regtopk.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def test_imports_point_one_way():
    """No module imports one that, in turn, imports it."""
    graph = {
        name: {
            target.removeprefix("tf_regtopk.")
            for target in imported_modules(ROOT / "tf_regtopk" / f"{name}.py")
            if target.startswith("tf_regtopk.")
        }
        for name in MODULES
    }
    while graph:
        leaves = {name for name, targets in graph.items() if not targets}
        assert leaves, f"These import each other in a circle: {graph}"
        graph = {
            name: targets - leaves
            for name, targets in graph.items()
            if name not in leaves
        }


def build_targets():
    """BUILD's targets by name: Starlark this plain is also Python."""
    targets = {}
    tree = ast.parse((ROOT / "BUILD").read_text(encoding="utf-8"))
    for node in tree.body:
        call = node.value
        if getattr(call, "func", None) and call.func.id.startswith("py_"):
            arguments = {
                keyword.arg: ast.literal_eval(keyword.value)
                for keyword in call.keywords
                if keyword.arg != "data"  # May be a glob.
            }
            targets[arguments["name"]] = {"rule": call.func.id, **arguments}
    return targets


def expected_deps(path):
    deps = set()
    for name in imported_modules(path):
        if name == "tf_regtopk":
            deps.add(":tf_regtopk")
        elif name.startswith("tf_regtopk."):
            deps.add(f":{name.removeprefix('tf_regtopk.')}")
        elif any(
            (folder / f"{name}.py").exists()
            for folder in (path.parent, ROOT / "examples")
        ):
            deps.add(f":{name}")
    return deps


@pytest.mark.parametrize(
    "folder, rule",
    [("tf_regtopk", "py_library"), ("examples", None), ("tests", None)],
)
def test_build_has_a_target_for_each_module(folder, rule):
    targets = build_targets()
    for path in (ROOT / folder).glob("*.py"):
        name = "tf_regtopk" if path.stem == "__init__" else path.stem
        assert name in targets, f"BUILD has no target for {path}"
        target = targets[name]
        is_test = path.stem.startswith("test_")
        assert is_test == (target["rule"] == "py_test")
        assert rule in (None, target["rule"])
        assert target["srcs"][0] == f"{folder}/{path.name}"
        missing = expected_deps(path) - set(target.get("deps", []))
        if is_test:
            missing |= {":conftest"} - set(target["deps"])
        assert not missing, f"BUILD: {name} lacks deps {missing}"


def test_build_has_no_target_without_a_file():
    for target in build_targets().values():
        for source in target["srcs"]:
            assert (ROOT / source).exists(), source
        for dep in target.get("deps", []):
            assert dep.removeprefix(":") in build_targets(), dep


def test_readme_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert [command.split(" && ")[-1] for command in commands] == [
        ".venv/bin/python examples/linear_regression.py",
        ".venv/bin/python -m pytest",
    ]
    extras = {e for c in commands for e in re.findall(r"\[(.*?)\]", c)}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in {name for group in extras for name in group.split(",")}:
        assert f'"{extra}": ' in setup


def test_readme_shows_code_that_runs():
    """The lines that the diff ends up with."""
    import keras
    import numpy as np

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    diff = re.search(r"```diff\n(.*?)```", readme, re.DOTALL).group(1)
    lines = [line[1:] for line in diff.splitlines() if line[:1] != "-"]
    program = "\n".join(lines).replace(
        "MirroredStrategy()", 'MirroredStrategy(["CPU:0"])'
    )

    def build_model():
        return keras.Sequential([keras.layers.Dense(3, activation="softmax")])

    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensors((np.ones((4, 2)), np.ones(4)))
    names = {"build_model": build_model, "dataset": dataset}
    exec(compile(program, "README.md", "exec"), names)
    assert isinstance(names["model"].optimizer, tf_regtopk.SparsifiedOptimizer)
    assert names["model"].optimizer.iterations.numpy() == 10
