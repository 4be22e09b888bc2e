"""Runs the code of a notebook in one process, without Jupyter.

    python run_notebook.py NOTEBOOK [OLD NEW]

Each line of the code that is OLD becomes NEW, so that a test is shorter.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("agg")


def main(notebook, old="", new=""):
    cells = json.loads(pathlib.Path(notebook).read_text("utf-8"))["cells"]
    variables = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            lines = [
                new if old == line else line for line in source.split("\n")
            ]
            exec(compile("\n".join(lines), cell["id"], "exec"), variables)


if __name__ == "__main__":
    main(*sys.argv[1:])
