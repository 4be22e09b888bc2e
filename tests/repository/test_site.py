"""The site of the documentation: pages, links, names, messages and code."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import keras
import paths
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk import sparsifiers

SITE = paths.ROOT / "docs" / "site"
GUIDES = paths.ROOT / "docs" / "guides"


@pytest.fixture(scope="module")
def names():
    """The public names of the site by their paths."""
    spec = importlib.util.spec_from_file_location("site_api", SITE / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    return {name.path: name for name in api.public_names()}


def test_every_public_name_has_a_page(names):
    for module in (tf_regtopk, sparsifiers, error_feedback, codecs):
        for name in set(module.__all__) - {"__version__"}:
            candidates = {f"tf_regtopk.{name}", f"{module.__name__}.{name}"}
            assert candidates & names.keys(), name
    assert all(name.summary for name in names.values())


def test_public_names_need_no_tensorflow():
    program = (
        "import api, sys; assert api.public_names(); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=SITE, check=True, timeout=60
    )


def build(folder, root=paths.ROOT):
    return subprocess.run(
        [
            sys.executable,
            root / "docs" / "site" / "build.py",
            f"--output={folder}",
        ],
        env={**os.environ, "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def has_generator():
    return all(map(importlib.util.find_spec, ["mkdocs", "material"])) and bool(
        importlib.util.find_spec("mkdocstrings")
    )


@pytest.mark.skipif(
    not has_generator(), reason="The site needs the extra `docs`."
)
def test_site_builds(tmp_path, names):
    """Strictly: a broken link or reference fails the build."""
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    for path, name in names.items():
        page = (tmp_path / "html" / name.page).with_suffix(".html")
        page = page.read_text("utf-8")
        assert f'id="{path}"' in page, path
        # Markdown would take a doctest without a fence for quotes.
        assert "<blockquote>" not in page, path
    index = (tmp_path / "html" / "index.html").read_text("utf-8")
    # Nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|<link[^>]* href)="https?:', index)


@pytest.mark.skipif(
    not has_generator(), reason="The site needs the extra `docs`."
)
def test_broken_links_are_errors(tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(paths.ROOT / "docs", root / "docs")
    for path in paths.ROOT.iterdir():
        if path.name not in ("docs", "build"):
            (root / path.name).symlink_to(path)
    with open(root / "docs" / "guides" / "start.md", "a") as page:
        page.write("\n[a](none.md) [b](../cluster.md#none) ![c](none.png)\n")
    result = build(tmp_path / "site", root)
    assert result.returncode != 0
    for link in ("'none.md'", "'../cluster.md#none'", "'none.png'"):
        assert f"contains a link {link}" in result.stderr, link


def messages_of(*folders):
    """The texts of the code, with … for what is put in."""
    found = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(v, "value", "") for v in node.values]
                    found.add(
                        "".join(p if isinstance(p, str) else "…" for p in parts)
                    )
                elif isinstance(node, ast.Constant) and isinstance(
                    node.value, str
                ):
                    found.add(re.sub("%[sd]", "…", node.value))
    return found


def test_troubleshooting_quotes_the_code():
    """Each message of the page begins one of the library."""
    page = (GUIDES / "troubleshooting.md").read_text("utf-8")
    page = re.sub(r"TensorFlow itself.*?(?=^## )", "", page, flags=re.M | re.S)
    quoted = re.findall(r"^\| (?:`` (.*?) ``|`(.*?)`) \|", page, re.M)
    assert len(quoted) > 40
    texts = messages_of(paths.ROOT / "tf_regtopk")
    for message in map("".join, quoted):
        # The rule of a value, which `check_number` puts together.
        beginning = message.replace("must be … Received: …", "must be …")
        assert any(text.startswith(beginning) for text in texts), message


def code_of(guide):
    """The Python of a page."""
    page = (GUIDES / f"{guide}.md").read_text("utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))


@pytest.mark.parametrize(
    "guide",
    ["method", "training", "saving", "own_parts", "../decentralised"],
)
def test_code_of_guide(guide, tmp_path, monkeypatch, mirrored):
    monkeypatch.chdir(tmp_path)
    code = code_of(guide).replace(
        "tf.distribute.MirroredStrategy()", "mirrored(2)"
    )
    names = {"__name__": guide, "mirrored": mirrored}
    names |= {"keras": keras, "tf_regtopk": tf_regtopk}
    exec(compile(code, f"{guide}.md", "exec"), names)
    if guide == "training":
        assert names["optimizer"].dense == ["*/embeddings"]
        assert float(names["loss"]) < 1
    if guide == "saving":
        assert isinstance(
            names["model"].optimizer, tf_regtopk.SparsifiedOptimizer
        )
    if guide == "../decentralised":
        assert names["model"].optimizer.replicas_agree
        assert keras.saving.load_model("average.keras").built
    if guide == "own_parts":
        report = names["model"].optimizer.wire_report()
        assert report.num_selected == 4


def test_code_of_start(tmp_path):
    """In a process of its own, because the CPU is split."""
    code = code_of("start").replace("epochs=3", "epochs=1")
    # The last two lines make the strategies of other machines.
    code = "\n".join(code.strip().split("\n")[:-3])
    assert "MultiWorker" not in code
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "by each of 2 replicas" in result.stdout


@pytest.mark.parametrize(
    "rule, class_",
    [
        (tf_regtopk.Accumulate(), tf.IndexedSlices),
        (tf_regtopk.Accumulate(momentum=0.9), tf.Tensor),
    ],
)
def test_tables_of_embeddings_are_left_to_keras(rule, class_, mirrored):
    """What docs/guides/training.md says of `dense=["*/embeddings"]`."""
    found = []

    class Watching(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            found.append(type(gradient))
            super().update_step(gradient, variable, learning_rate)

        def apply(self, grads, trainable_variables=None):
            found.append(grads[0])
            super().apply(grads, trainable_variables)

    with mirrored(2).scope():
        model = keras.Sequential(
            [keras.Input([2]), keras.layers.Embedding(7, 3)]
        )
        model.compile(
            optimizer=tf_regtopk.SparsifiedOptimizer(
                Watching(0.1), error_feedback=rule, dense=["*/embeddings"]
            ),
            loss="mse",
        )
    model.fit(tf.zeros([4, 2]), tf.zeros([4, 2, 3]), verbose=0)
    assert isinstance(found[0], class_)
