"""Builds the site of the documentation, of which a broken link is an error.

    python docs/site/build.py

The site is then in `build/site/html`. Neither TensorFlow nor a network is
needed, only the extra `docs`. The code is read, and not imported.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

import api
import pages

CONFIG = pathlib.Path(__file__).with_name("mkdocs.yml")


def build(folder: pathlib.Path) -> int:
    """Writes the pages and their configuration, and runs MkDocs.

    Args:
        folder: Folder for all files. A former one is removed.

    Returns:
        The exit status of MkDocs, 0 if all is well.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pages.write(folder / "pages")
    config = CONFIG.read_text("utf-8")
    config = config.replace("  # API\n", "\n".join([*pages.navigation(), ""]))
    config = config.replace("ROOT/", f"{api.ROOT}/")
    path = folder / "mkdocs.yml"
    path.write_text(config, "utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", path],
        check=False,
        # Material's note on the next version of MkDocs is for maintainers.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    ).returncode


def main() -> int:
    """Builds the site, and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=api.ROOT / "build" / "site"
    )
    folder = parser.parse_args().output.resolve()
    status = build(folder)
    if status == 0:
        print(f"The site is in {folder / 'html' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
