"""Makes the notebooks of this folder from the scripts beside them; needs jupytext.

    python colab/generate.py

The scripts are jupytext's percent format, in which a magic is a comment, so that ruff reads them. Notebooks have no
outputs, and the same bytes wherever they are made. The repository's address is that of setup.py, its `url`: it is
written into the scripts and README.md, too.
"""

import re
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)
ADDRESS = re.compile(r"(?<=github/)[\w.-]+/[\w.-]+(?=/blob/)|(?<=git\+https://github\.com/)[\w.-]+/[\w.-]+(?=\")")
"""OWNER/NAME where a badge leads to and where notebooks install from."""


def repository() -> str:
    """Return OWNER/NAME of setup.py's `url`."""
    text = (FOLDER.parent / "setup.py").read_text(encoding="utf-8")
    return re.search(r'\burl="https://github\.com/([\w.-]+/[\w.-]+)"', text)[1]


def with_address(path: Path) -> str:
    """Return the text of a script or page with the repository's address in it."""
    return ADDRESS.sub(repository(), path.read_text(encoding="utf-8"))


def notebook_of(script: Path) -> nbformat.NotebookNode:
    """Return the notebook of a script."""
    notebook = jupytext.reads(with_address(script), fmt="py:percent")
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem.replace('_', '-')}-{number:02}"  # jupytext draws them
    return notebook


def text_of(script: Path) -> str:
    """Return what the notebook's file holds."""
    return nbformat.writes(notebook_of(script)) + "\n"


def main() -> None:
    for page in (README, *SCRIPTS):
        page.write_text(with_address(page), encoding="utf-8")
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(text_of(script), encoding="utf-8")


if __name__ == "__main__":
    main()
