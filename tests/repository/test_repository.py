"""The public namespace, and that BUILD, README and layers fit the code."""

import ast
import itertools
import re
import subprocess
import sys

import mutation
import paths
import pytest

import tf_regtopk

PUBLIC = {
    "AverageTracker",
    "CrossGradientTraining",
    "CrossGradients",
    "LayerMask",
    "LinearGossip",
    "MixingRule",
    "NonlinearGossip",
    "SkewScout",
    "tracked",
    "ConsensusDistance",
    "EvaluateAverage",
    "averaged",
    "DecentralizedOptimizer",
    "Cliques",
    "Complete",
    "Exponential",
    "Grid",
    "MixingTopology",
    "OnePeerExponential",
    "PeriodicGlobalAveraging",
    "Ring",
    "RingPass",
    "Torus",
    "AllGather",
    "AllReduce",
    "Cluster",
    "EntryTopology",
    "Hierarchical",
    "Topology",
    "Accumulate",
    "BFloat16",
    "Backup",
    "Codec",
    "CompressedDownlink",
    "Dense",
    "DensityDecay",
    "DensityWarmup",
    "EF21",
    "ErrorFeedback",
    "Float16",
    "Float32",
    "IndexCodec",
    "LearnedShift",
    "LocalAdam",
    "LossScaleOptimizer",
    "Monitor",
    "MultiWorkerMirroredStrategy",
    "Natural",
    "NoFeedback",
    "RandomK",
    "ReduceScatter",
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
    "methods",
    "unwrap",
    "worker_path",
    "wrap",
}
# Each layer imports only from those before it.
LAYERS = (
    ("log", "validation", "version"),
    ("keras_internals", "launch", "sizes", "training_validation"),
    ("hyper_parameters", "kernels", "label_skew"),
    ("distribute", "selection", "sparsifiers"),
    ("codecs", "saving"),
    ("error_feedback", "planning"),
    ("steps",),
    ("optimizers",),
    ("callbacks", "methods", "simulation"),
    ("__init__", "advise", "run"),
    ("selftest",),
)
PACKAGE = paths.ROOT / "tf_regtopk"


def test_public_namespace():
    assert set(tf_regtopk.__all__) == PUBLIC
    visible = {name for name in vars(tf_regtopk) if not name.startswith("_")}
    # Packages and modules show once they have been imported.
    parts = set(itertools.chain(*LAYERS))
    assert visible - parts == PUBLIC - {"__version__", "methods"}


def test_version_needs_no_tensorflow():
    program = (
        "import runpy, sys; "
        "runpy.run_path('tf_regtopk/version.py'); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=paths.ROOT, check=True, timeout=60
    )


def imported_parts(path):
    """The packages and modules at the top of `tf_regtopk` that a file imports.

    `__init__` stands for the public namespace.
    """
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "tf_regtopk":
                parts.add(rest[0] if rest else "__init__")
    return parts


def files_of(part):
    """The Python files of a package or module at the top of `tf_regtopk`."""
    module = PACKAGE / f"{part}.py"
    return [module] if module.exists() else (PACKAGE / part).rglob("*.py")


def test_layers_are_complete():
    found = {path.stem for path in PACKAGE.glob("*.py")}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == set(itertools.chain(*LAYERS))


def test_imports_point_one_way():
    """No module imports one of its own layer or of a later one."""
    below = set()
    for layer in LAYERS:
        for part in layer:
            for path in files_of(part):
                above = imported_parts(path) - below - {part}
                assert not above, f"{path} must not import {above}"
        below |= set(layer)


def imports_within(package, path):
    """The modules and packages of a package that a file or a folder imports."""
    folders = package.relative_to(paths.ROOT).parts
    name = ".".join(folders)
    files = path.rglob("*.py") if path.is_dir() else [path]
    found = {
        alias.name
        if node.module == name
        else node.module.split(".")[len(folders)]
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        and f"{node.module}.".startswith(f"{name}.")
        for alias in node.names
    }
    return found - {path.stem}


def test_modules_do_not_import_each_other():
    """Within a package no module imports one that, in turn, imports it."""
    for package in (path.parent for path in PACKAGE.rglob("*/__init__.py")):
        graph = {
            path.stem: imports_within(package, path)
            for path in (
                *package.glob("[!_]*.py"),
                *(path.parent for path in package.glob("*/__init__.py")),
            )
        }
        while graph:
            leaves = {name for name, targets in graph.items() if not targets}
            assert leaves, f"These import each other in a circle: {graph}"
            graph = {
                name: targets - leaves
                for name, targets in graph.items()
                if name not in leaves
            }


def build_targets(path):
    """The targets of a BUILD file by name: Starlark this plain is Python."""
    targets = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        call = node.value
        if getattr(call, "func", None) and call.func.id == "py_library":
            keywords = {k.arg: k.value for k in call.keywords}
            name = ast.literal_eval(keywords["name"])
            deps = keywords.get("deps", ast.List([]))
            targets[name] = set(ast.literal_eval(deps))
    return targets


def label(part):
    """The target of a part, as other packages name it."""
    if part == "__init__":
        return "//tf_regtopk"
    if (PACKAGE / part).is_dir():
        return f"//tf_regtopk/{part}"
    return f"//tf_regtopk:{part}"


@pytest.mark.parametrize("part", [*itertools.chain(*LAYERS)])
def test_build_has_the_imports(part):
    """Of each package and module, no more and no less."""
    is_package = (PACKAGE / part).is_dir()
    path = (PACKAGE / part if is_package else PACKAGE) / "BUILD"
    name = "tf_regtopk" if part == "__init__" else part
    deps = {
        f"//tf_regtopk{dep}" if dep.startswith(":") else dep
        for dep in build_targets(path)[name]
    }
    imported = set().union(*map(imported_parts, files_of(part))) - {part}
    assert deps == {label(other) for other in imported}


@pytest.mark.parametrize("folder", ["examples", "examples/studies"])
def test_build_names_examples(folder):
    """Every script of the folder is a program of its BUILD."""
    text = (paths.ROOT / folder / "BUILD").read_text(encoding="utf-8")
    for path in (paths.ROOT / folder).glob("*.py"):
        is_script = "__main__" in path.read_text(encoding="utf-8")
        assert is_script == (f'        "{path.stem}",' in text), path


def test_harmless_mutants_are_of_lines_that_exist():
    """Else such a mutant, explained before, is printed as a survivor."""
    for module, line, _ in itertools.chain(*mutation.HARMLESS.values()):
        path = paths.ROOT / "tf_regtopk" / module
        source = " ".join(path.read_text(encoding="utf-8").split())
        assert " ".join(line.split()) in source, (module, line)


def test_readme_commands():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert [command.split(" && ")[-1] for command in commands] == [
        ".venv/bin/python examples/linear_regression.py",
        ".venv/bin/python -m pytest",
    ]
    extras = {e for c in commands for e in re.findall(r"\[(.*?)\]", c)}
    setup = (paths.ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in {name for group in extras for name in group.split(",")}:
        assert f'"{extra}": ' in setup


def test_readme_shows_code_that_runs():
    """The lines that the diff ends up with."""
    import keras
    import numpy as np

    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
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
