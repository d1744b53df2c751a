"""The notebook: its cells run, and it was executed as it stands."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs/digits.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.long
def test_cells_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "IPython.display", type("display", (), {"Image": Path}))
    matplotlib.use("Agg")
    training = 'main(["'
    assert sum(training in cell for cell in CELLS) == 1
    quick = training + '--max_train_steps=2", "--evaluation_steps=0", "--num_validation_images=0", "'
    variables = {}
    for cell in CELLS:
        exec(cell.replace(training, quick).replace("num_samples=1797", "num_samples=100"), variables)
    assert len(variables["rows"]) == 4 * 3 * 2


def test_it_was_executed():
    counts = [cell["execution_count"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) or "image/jpeg" in o.get("data", {}) for o in outputs) >= 5
