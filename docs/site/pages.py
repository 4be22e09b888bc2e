"""The Markdown pages of the site: those of `docs/`, and some that are not.

A link of a Markdown file is right in the repository. The site has the same
pages at other places, so each link is written anew:

    a page of docs/           stays a page
    README.md and its like    the page of `PAGES`
    any other file            a page that shows the file
    `SparsifiedOptimizer`     the page of this public name

A public name in code, as in the last line, becomes a link.
"""

from collections.abc import Iterator
import pathlib
import posixpath
import re
import shutil

import api

# Markdown files outside of docs/, and their places in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "measured_claims.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml"}

NAMES = api.public_names()
PLACES = {name.path.split(".")[-1]: name.page for name in NAMES}
# The first part is code that holds backticks, and stays as it is.
LINK_OR_NAME = re.compile(
    r"``.+?``"
    r"|(?P<text>\[[^\]]*\])\((?P<target>[^)\s]+)\)"
    r"|(?<!`)`(?:tf_regtopk\.)?(?P<name>\w+)`(?!`)"
)
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def write(folder: pathlib.Path) -> None:
    """Writes all pages and figures into a folder.

    Args:
        folder: The folder, which is made.
    """
    pages = {
        **{path: place for path, place in PAGES.items()},
        **{path: _place(path) for path in _files_of_docs(".md")},
    }
    texts = {path: (api.ROOT / path).read_text("utf-8") for path in pages}
    for path, place in pages.items():
        _write(folder / place, rewritten(texts[path], path))
    for path in _files_of_docs(".png"):
        target = folder / _place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(api.ROOT / path, target)
    for path in {p for o, text in texts.items() for p in _shown(text, o)}:
        language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
        code = (api.ROOT / path).read_text("utf-8")
        text = f"# `{path}`\n\n````{language}\n{code}````\n"
        _write(folder / _place(path), text)
    for name in NAMES:
        title = name.path.split(".")[-1]
        text = f"---\ntitle: {title}\n---\n\n::: {name.path}\n"
        _write(folder / name.page, text)
    _write(folder / "api/index.md", _table_of_names())


def navigation() -> list[str]:
    """Returns the lines of the configuration that list the public names."""
    lines, section = ["  - API:", "      - api/index.md"], None
    for name in NAMES:
        if name.section != section:
            section = name.section
            lines.append(f"      - {section}:")
        title = name.path.removeprefix("tf_regtopk.")
        lines.append(f"          - {title}: {name.page}")
    return lines


def rewritten(markdown: str, path: str) -> str:
    """Returns a page with the links of the site.

    Args:
        markdown: The page, with the links of the repository.
        path: Its path in the repository.

    Returns:
        The page.
    """
    place = _place(path)
    parts = FENCE.split(markdown)
    # Every second part is a block of code.
    parts[::2] = [
        LINK_OR_NAME.sub(lambda match: _link(match, path, place), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def _link(match: re.Match[str], path: str, place: str) -> str:
    if match["name"] in PLACES:
        return f"[{match[0]}]({_relative(PLACES[match['name']], place)})"
    linked = match["target"] and _path_of(match["target"], path)
    if not linked:
        return match[0]
    anchor = match["target"].partition("#")[2]
    target = _relative(_place(linked), place) + (anchor and f"#{anchor}")
    return f"{match['text']}({target})"


def _path_of(target: str, path: str) -> str | None:
    """The path in the repository that a link of a page leads to."""
    target = target.partition("#")[0]
    if not target or ":" in target:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _place(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path == "docs":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"source/{path}.md")


def _relative(place: str, of_page: str) -> str:
    return posixpath.relpath(place, posixpath.dirname(of_page) or ".")


def _files_of_docs(suffix: str) -> list[str]:
    return [
        path.relative_to(api.ROOT).as_posix()
        for path in sorted((api.ROOT / "docs").rglob(f"*{suffix}"))
    ]


def _shown(markdown: str, path: str) -> Iterator[str]:
    """The files that a page links to, and that are no pages by themselves."""
    for match in LINK_OR_NAME.finditer(FENCE.sub("", markdown)):
        linked = match["target"] and _path_of(match["target"], path)
        # A link to a file that is missing is left to the generator to refuse.
        if (
            linked
            and _place(linked).startswith("source/")
            and (api.ROOT / linked).is_file()
        ):
            yield linked


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _table_of_names() -> str:
    rows = [
        f"| [`{name.path}`]({_relative(name.page, 'api/index.md')}) "
        f"| {name.summary} |"
        for name in NAMES
    ]
    return "\n".join(
        [
            "# API",
            "",
            "The pages of the names are the docstrings of the code.",
            "",
            "| name | what |",
            "| --- | --- |",
            *rows,
            "| `tf_regtopk.__version__` | The version, a string. |",
            "",
        ]
    )
