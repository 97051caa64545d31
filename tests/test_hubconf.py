"""Loading through torch.hub, in processes of their own that run in another folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import load_model

ROOT = Path(__file__).resolve().parents[1]
LOAD = "import torch\ndef load(*args, **options): return torch.hub.load({root!r}, *args, source='local', **options)\n"


def run_elsewhere(folder, program):
    """Run a program in another folder, with a function `load` that calls torch.hub.load on this project."""
    (folder / "program.py").write_text(LOAD.format(root=str(ROOT)) + program)
    return subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True)


def test_released_networks_upscale_arrays_pillow_images_and_tensors(tmp_path):
    done = run_elsewhere(
        tmp_path,
        "import numpy as np\n"
        "from PIL import Image\n"
        "for scale in (2, 3, 4):\n"
        "    model = load(f'smsr_x{scale}', pretrained=True)\n"
        "    array = np.random.default_rng(0).integers(0, 256, (9, 10, 3), dtype=np.uint8)\n"
        "    batch = torch.from_numpy(array).permute(2, 0, 1)[None]\n"
        "    sr = model.upscale(array)\n"
        "    assert sr.shape == (9 * scale, 10 * scale, 3)\n"
        "    assert np.array_equal(model.upscale(Image.fromarray(array)), sr)\n"
        "    assert np.array_equal(model.upscale(batch)[0].permute(1, 2, 0), sr)\n"
        "torch.save(model.state_dict(), 'x4.pt')\n"
        "own = load('load_model', 'x4.pt')\n"
        "assert np.array_equal(own.upscale(array), sr)\n",
    )
    assert done.returncode == 0, done.stderr
    released = load_model(ROOT / "experiment/released/SMSR_X4/model/model_best.pt").state_dict()
    loaded = torch.load(tmp_path / "x4.pt")
    assert all(torch.equal(value, released[key]) for key, value in loaded.items())


def test_untrained_networks(tmp_path):
    done = run_elsewhere(
        tmp_path,
        "for model in (load('smsr_x3', pretrained=False), load('edsr_baseline', scale=3)):\n"
        "    print(type(model).__name__, model.scale, model.training)\n"
        "try:\n"
        "    load('edsr_baseline', pretrained=True)\n"
        "except Exception as error:\n"
        "    print(error)\n",
    )
    *models, message = done.stdout.splitlines()
    assert models == ["SMSR 3 False", "EDSR 3 False"], done.stderr
    assert message == "edsr_baseline: no weights are released; load a file with the entry point load_model"


def test_a_loaded_network_can_be_pickled_and_the_path_stays_as_it_was(tmp_path):
    done = run_elsewhere(
        tmp_path,
        "import io, sys\n"
        "before = list(sys.path)\n"
        "model = load('smsr_x2')\n"
        "assert sys.path == before\n"
        "torch.save(model, 'model.pt')\n"
        "again = torch.load('model.pt', weights_only=False)\n"
        "x = torch.rand(1, 3, 5, 6) * 255\n"
        "torch.testing.assert_close(again(x), model(x))\n",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("other", ["utility.py", "model.py", "model/__init__.py", "schema/nothing.txt"])
def test_a_program_with_other_modules_of_these_names_is_told(tmp_path, other):
    path = tmp_path / other
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    name = other.partition("/")[0].removesuffix(".py")
    done = run_elsewhere(tmp_path, f"import {name}\nload('smsr_x2')\n")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: {ROOT}: needs its own module {name!r}, but this process has imported {tmp_path}"
    )
    assert last.endswith("; load the network in another process")


def test_modules_of_these_names_that_are_not_imported_do_not_matter(tmp_path):
    for name in ("utility.py", "model.py", "files.py"):
        (tmp_path / name).write_text("raise SystemExit('imported the wrong one')")
    done = run_elsewhere(tmp_path, "print(load('smsr_x2').scale)")
    assert done.stdout == "2\n", done.stderr


def test_all_modules_that_a_network_imports_are_checked(tmp_path):
    done = run_elsewhere(
        tmp_path,
        "import sys\n"
        "before = set(sys.modules)\n"
        "load('smsr_x2')\n"
        f"files = {{name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}}\n"
        f"print(*sorted({{name.partition('.')[0] for name in files if files[name].startswith({str(ROOT)!r})}}))\n",
    )
    assert done.stdout.split() == checked_names(), done.stderr


def checked_names():
    tree = ast.parse((ROOT / "hubconf.py").read_text())
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "_NEEDED")
    return sorted(ast.literal_eval(names))


def test_entry_points_are_those_of_the_documentation(monkeypatch):
    import hubconf

    found = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert found == {"smsr_x2", "smsr_x3", "smsr_x4", "edsr_baseline", "load_model"}
