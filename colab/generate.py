"""Makes the notebooks of this folder from the scripts beside them; needs jupytext.

    python colab/generate.py

The scripts are jupytext's percent format, in which a magic is a comment, so that ruff reads them. Notebooks have no
outputs, and the same bytes wherever they are made.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)


def notebook_of(script: Path) -> nbformat.NotebookNode:
    """Return the notebook of a script."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem.replace('_', '-')}-{number:02}"  # jupytext draws them
    return notebook


def text_of(script: Path) -> str:
    """Return what the notebook's file holds."""
    return nbformat.writes(notebook_of(script)) + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(text_of(script), encoding="utf-8")
