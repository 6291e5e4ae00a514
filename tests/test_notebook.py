"""In a notebook: the tour runs, progress bars are seen, and reports are pictures and text."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def run(notebook, folder):
    """Runs a notebook; raises what a cell raises. Returns what its widgets hold, as text."""
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return str(client.widget_state)


def outputs(notebook, word):
    """The outputs of the cell with a word in its code."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and word in c.source)
    return cell.outputs


def kinds(notebook, word):
    return [kind for out in outputs(notebook, word) for kind in out.get("data", {})]


@pytest.mark.long
def test_tour(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    written = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert written
    assert not [out for out in written if out.output_type == "error"]
    run(notebook, tmp_path)
    assert {file.name for file in (tmp_path / "tour").iterdir()} == {
        *("training.html", "student.html", "student.safetensors", "student.onnx")
    }
    assert "text/html" in kinds(notebook, "model = timm")
    assert "application/vnd.jupyter.widget-view+json" in kinds(notebook, "fit_(student")
    (said,) = outputs(notebook, "print(report(hyper))")
    assert "test_resnet" in said.text
    assert "untrained" in (tmp_path / "tour" / "training.html").read_text()


def test_bars_are_shown_unless_silenced(tmp_path):
    cells = [
        "import torch\nfrom torch import nn\nfrom hyperize import fit_, hyperize, report\n"
        "model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))\n"
        "data = [torch.randn(4, 16, 8, 8)]",
        "hyper = hyperize(model, compression=4)\nshown = fit_(hyper, model, data=data, sweeps=2)",
        "quiet = fit_(hyper, model, data=data, sweeps=2, progress=False)",
        "print(report(hyper))",
        "hyper.hypernet.plan",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    held = run(notebook, tmp_path)
    assert "application/vnd.jupyter.widget-view+json" in kinds(notebook, "shown =")
    assert "running the teacher" in held
    assert "fitting" in held
    assert outputs(notebook, "quiet =") == []
    (said,) = outputs(notebook, "print(report(hyper))")
    assert "targets, parameters" in said.text  # rich itself would have shown it as a picture
    assert "text/html" in kinds(notebook, "hypernet.plan")
