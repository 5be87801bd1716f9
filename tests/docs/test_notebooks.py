"""The tutorials run from their first cell to their last, and are committed with the output of such a run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.ipynb"))


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_there_are_two_tutorials():
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_output(path):
    notebook = nbformat.read(path, as_version=4)
    assert pictures(notebook) > 0
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    for machine in ("site-packages", "/tmp/", "/home/", "Warning"):
        assert machine not in printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    expected = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # execute raises an error at the first cell that fails
    assert pictures(notebook) == expected
