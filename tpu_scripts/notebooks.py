"""Make notebooks of the examples of methods, examples/TOPIC/NAME.py, and run them.

    python tpu_scripts/notebooks.py                     # all
    python tpu_scripts/notebooks.py guiders/high_scales

writes docs/notebooks/TOPIC/NAME.ipynb with the outputs of the run, and behind them the pictures that it has written.
An example is the only source: change it, and run this again. Needs `pip install -e ".[docs]"`.
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, NOTEBOOKS = ROOT / "examples", ROOT / "docs" / "notebooks"
PICTURES = {".png": "image/png", ".gif": "image/gif"}
SECONDS = 1200  # that a cell may take


def of_example(path: Path) -> nbformat.NotebookNode:
    """Return the notebook of an example, not run."""
    notebook = jupytext.reads(path.read_text(), fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # random ones would change with every run
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def run(path: Path) -> nbformat.NotebookNode:
    """Return the notebook of an example with its outputs, and the pictures it wrote behind those of its last cell."""
    notebook = of_example(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tests").symlink_to(ROOT / "tests")  # some take the model of shapes from there
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}}).execute()
        written = sorted(file for file in Path(folder).iterdir() if file.suffix in PICTURES)
        for file in written:
            data = {PICTURES[file.suffix]: base64.b64encode(file.read_bytes()).decode(), "text/plain": file.name}
            last = next(cell for cell in reversed(notebook.cells) if cell.cell_type == "code")
            last.outputs.append(nbformat.v4.new_output("display_data", data))
    for cell in notebook.cells:
        cell.metadata = {}  # when it was run
        if cell.cell_type == "code":  # progress bars and warnings are not what the notebook shows
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Make and run the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TOPIC/NAME", help="default: all")
    names = parser.parse_args().names
    paths = [EXAMPLES / f"{name}.py" for name in names] or sorted(
        {*EXAMPLES.glob("*/*.py")} - {*EXAMPLES.glob("space/*.py")}
    )
    for path in tqdm(paths, desc="notebooks"):
        target = NOTEBOOKS / path.relative_to(EXAMPLES).with_suffix(".ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(run(path), target)


if __name__ == "__main__":
    main()
