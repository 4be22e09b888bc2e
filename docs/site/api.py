"""The public names, found in the source without importing TensorFlow."""

import ast
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Packages whose `__all__` is public, the first one before the others.
PACKAGES = (
    "tf_regtopk",
    "tf_regtopk.sparsifiers",
    "tf_regtopk.error_feedback",
    "tf_regtopk.codecs",
)
# Public modules with a page each, because their names belong together.
MODULES = (
    "tf_regtopk.methods",
    "tf_regtopk.simulation",
    "tf_regtopk.label_skew",
)
# The folders of the code, by the titles that readers know.
SECTIONS = {
    "optimizers": "Optimizers",
    "steps": "Optimizers",
    "sparsifiers": "Sparsifiers",
    "error_feedback": "Error feedback",
    "codecs": "Codecs",
    "distribute": "Strategies and topologies",
    "callbacks": "Callbacks and loading",
    "saving": "Saving",
}
OTHERS = "Modules"


class Name(NamedTuple):
    """A public name.

    Args:
        path: Its path for `import`, such as `tf_regtopk.TopK`.
        section: The title of its section.
        summary: The first sentence of its docstring.
    """

    path: str
    section: str
    summary: str

    @property
    def page(self) -> str:
        """The place of its page in the site."""
        return f"api/{self.path.removeprefix('tf_regtopk.')}.md"


def public_names() -> list[Name]:
    """Returns all public names that have a page, in the order of sections."""
    found: dict[str, Name] = {}
    for package in PACKAGES:
        imported = _imports(package)
        for name in _all(package):
            if name in imported and name not in found:
                module = imported[name]
                folder = module.split(".")[1]
                found[name] = Name(
                    f"{package}.{name}",
                    SECTIONS[folder],
                    _summary(module, name),
                )
    modules = [Name(m, OTHERS, _summary(m)) for m in MODULES]
    order = [*SECTIONS.values()]
    named = sorted(found.values(), key=lambda n: order.index(n.section))
    return [*named, *modules]


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text("utf-8"))


def _all(package: str) -> list[str]:
    """The `__all__` of a package."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"`{package}` must have an `__all__`. Received: none")


def _imports(package: str) -> dict[str, str]:
    """The names of functions and classes, and the modules that define them."""
    return {
        alias.name: node.module
        for node in ast.walk(_tree(package))
        if isinstance(node, ast.ImportFrom) and node.module.count(".") > 1
        for alias in node.names
    }


def _summary(module: str, name: str | None = None) -> str:
    """The first line of a docstring."""
    tree = _tree(module)
    if name is not None:
        [tree] = [n for n in tree.body if getattr(n, "name", None) == name]
    return ast.get_docstring(tree).partition("\n")[0]
