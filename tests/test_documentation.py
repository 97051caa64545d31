"""The Python code of README.md and docs/ runs as it is written."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [
    pytest.param(program, id=f"{path.name}-{index}")
    for path in (ROOT / "README.md", ROOT / "docs/integrations.md")
    for index, program in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
    if "owner/" not in program  # of a repository on the Internet
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_code_runs_as_it_is_written(tmp_path, monkeypatch, program, request):
    if "spandrel" in program:
        request.getfixturevalue("torchvision")
        pytest.importorskip("spandrel")
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(tmp_path / "photo.jpg")
    for name in ("experiment", "testsets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("/path/to/this/folder", str(ROOT)), {})
