"""The notebooks are those of the examples, and were run."""

from __future__ import annotations

import jupytext
import nbformat
import pytest

from tests.test_examples import FOLDER, LABORATORY

NOTEBOOKS = FOLDER.parent / "docs" / "notebooks"
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in LABORATORY]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_example_and_was_run(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    example = jupytext.reads((FOLDER / f"{name}.py").read_text(), fmt="py:percent")
    kept = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert kept == [(cell.cell_type, cell.source) for cell in example.cells], (
        f"run python tpu_scripts/notebooks.py {name}"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert outputs, "it shows nothing"


def test_there_is_no_notebook_without_an_example():
    found = {path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in NOTEBOOKS.rglob("*.ipynb")}
    assert found == set(NAMES)
