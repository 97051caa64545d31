"""docs/quickstart.ipynb: its code runs, prints what is stored in it, and leaves no files behind."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
MEASURED = re.compile(r"\d+\.\d\d s$|^step")  # times, and losses that depend on the processor


def run_code(folder):
    sources = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    program = "\n".join(["display = lambda *objects, **options: None", *sources])  # Jupyter has this built in
    return subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True, timeout=300, encoding="utf-8"
    )


def files():
    folders = (ROOT / "docs", ROOT / "testsets", ROOT / "experiment/released")
    return {path for folder in folders for path in folder.rglob("*")} | set(ROOT.glob("*"))


def test_the_code_runs_and_prints_what_is_stored():
    before = files()
    done = run_code(ROOT / "docs")
    assert done.returncode == 0, done.stderr
    stored = "".join(
        "".join(output["text"])
        for cell in CELLS
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    printed, expected = done.stdout.splitlines(), stored.splitlines()
    assert len(printed) == len(expected)
    assert sum(line.startswith("step") for line in printed) == 10
    for line, wanted in zip(printed, expected, strict=True):
        assert line == wanted or (MEASURED.search(line) and MEASURED.search(wanted))
    assert files() == before


def test_it_shows_pictures_that_are_small():
    outputs = [output.get("data", {}) for cell in CELLS for output in cell.get("outputs", [])]
    assert sum("image/png" in data or "image/jpeg" in data for data in outputs) == 3
    pictures = [value for data in outputs for key, value in data.items() if key.startswith("image/")]
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        image.load()
        assert 300 <= image.width <= 800
    assert sum(map(len, pictures)) < 1_000_000


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["id"])
def test_links_lead_to_files(cell):
    for target in re.findall(r"\]\(([\w./-]+)\)", "".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
        assert (ROOT / "docs" / target).is_file()
