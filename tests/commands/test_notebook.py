"""The tutorial's notebook: its sections are complete, and it runs, on a tiny network and without internet."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data.painter import paint_pair

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_its_sections_are_those_of_the_tutorials_page():
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    sections = [cell.split(",")[0] for cell in re.findall(r"^\| ([A-Z][^|]+?) \|", page, re.MULTILINE)]
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    assert len(sections) > 10 and [name for name in sections if name not in headings] == []


def test_it_is_kept_without_results():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def paint_few(cache: Path) -> None:
    """What the notebook's data set would be, with few pictures, where it is looked for."""
    folder = cache / "synthetic-v1-400-20-20-seed0"
    for number, split in enumerate(("train", "val", "test")):
        (folder / split).mkdir(parents=True)
        for i in range(3):
            paint_pair(np.random.default_rng((0, number, i))).save(folder / split / f"{i + 1}.jpg")


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paint_few(tmp_path / "cache")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    small = 'width = 4\nsteps = 20\nsize = {"netG": "unet_32", "load_size": 36, "crop_size": 32}'
    assert set(re.findall(r"^(\w+) =", small, re.MULTILINE)) == set(
        re.findall(r"^(\w+) =", parameters.source, re.MULTILINE)
    )
    parameters.source = small
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    for expected in (
        "3 pairs, ",
        "done: 20 steps",
        "tutorial, step 20",
        "gen_l1_loss: ",
        "tutorial.gif: 11 frames, steps 0 to 20, 8.03 s",
        "3 pairs, translating the right half",
    ):
        assert expected in printed
    assert "error" not in printed
    with Image.open(tmp_path / "results" / "generated" / "1.png") as picture:
        assert np.asarray(picture).shape == (256, 256, 3)
