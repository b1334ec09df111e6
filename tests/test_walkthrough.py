"""The notebook runs from top to bottom, shows what it says, and its stored outputs are those of the code that stands there."""

import contextlib
import io
import json
import os
import sys
import tempfile

import matplotlib
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

with open(os.path.join(ROOT, "examples", "walkthrough.ipynb"), encoding="utf-8") as f:
    CELLS = [cell for cell in json.load(f)["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(names after the last cell, what each cell printed), of the cells run in order in an empty folder."""
    matplotlib.use("Agg")
    names, printed, threads = {}, [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(tempfile, "tempdir", os.getcwd())
        for i, cell in enumerate(CELLS, 1):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
            printed.append(out.getvalue())
        names["plt"].close("all")
        torch.set_num_threads(threads)
    return names, printed


def test_it_learns_grows_to_its_budget_and_merges(run):
    names, _ = run
    assert sum(names["ranks"][0]) == 3 and sum(names["ranks"][-1]) == 4 * 3 and max(names["ranks"][-1]) == names["ranks"][-1][1]
    assert names["losses"][-1] < names["losses"][0] / 15
    assert torch.equal(names["base"](names["x"]), names["adapted"]), "the saved adapter on a fresh base"
    assert all(type(names["model"][i]) is torch.nn.Linear for i in (0, 2, 4))
    assert (names["model"](names["x"]) - names["adapted"]).abs().max() < 1e-12 < (names["before"] - names["adapted"]).abs().max()


def test_the_stored_outputs_are_what_is_printed(run):
    """All of it, to the digit: the notebook computes in float64."""
    stored = [[o for o in cell["outputs"] if o["output_type"] == "stream"] for cell in CELLS]
    assert ["".join(text for o in outputs for text in o["text"]) for outputs in stored] == run[1]
    images = [o["data"]["image/png"] for cell in CELLS for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(images) == 1 and len(images[0]) < 50_000
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
