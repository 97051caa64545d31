"""The architectures in the registry of the real spandrel; skipped without that package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import build_model
from model.weights import write_weights

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "SMSR": {"n_feats": 8, "n_blocks": 2, "n_layers": 3},
    "EDSR": {"n_feats": 8, "n_resblocks": 2, "res_scale": 0.1},
}
every_network = pytest.mark.parametrize("name", SIZES)


@pytest.fixture(scope="module")
def spandrel(torchvision):
    """The package, with the networks in a registry of their own and behind those of the package."""
    spandrel = pytest.importorskip("spandrel")
    from model.spandrel import register

    register()
    register()  # changes nothing
    return spandrel


def build(name, **sizes):
    return build_model(name, **{"scale": 2} | SIZES[name] | sizes).eval()


@every_network
@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize(("scale", "n_colors", "rgb_range"), [(2, 3, 255), (3, 1, 1), (4, 3, 1)])
def test_files_load_and_give_the_same_images(spandrel, tmp_path, name, suffix, scale, n_colors, rgb_range):
    model = build(name, scale=scale, n_colors=n_colors, rgb_range=rgb_range)
    write_weights(tmp_path / f"w.{suffix}", model.state_dict())
    loaded = spandrel.ModelLoader().load_from_file(tmp_path / f"w.{suffix}")
    assert isinstance(loaded, spandrel.ImageModelDescriptor)
    assert (loaded.architecture.id, loaded.purpose, loaded.scale) == (name, "SR", scale)
    assert (loaded.input_channels, loaded.output_channels, loaded.tags) == (n_colors, n_colors, ["8nf", "2nb"])
    image = torch.rand(1, n_colors, 7, 9)
    torch.testing.assert_close(loaded(image), model.upscale(image))


@every_network
@pytest.mark.parametrize(
    "wrap", [lambda state: {"params": state}, lambda state: {f"module.{k}": state[k] for k in state}]
)
def test_checkpoints_and_released_sizes_load(spandrel, name, wrap):
    model = build_model(name, scale=4)
    loaded = spandrel.ModelLoader().load_from_state_dict(wrap(model.state_dict()))
    assert loaded.architecture.id == name
    assert loaded.tags == ["64nf", "5nb" if name == "SMSR" else "16nb"]


@every_network
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(spandrel, name, dtype):
    model = build(name)
    loaded = spandrel.ModelLoader().load_from_state_dict(model.state_dict()).to(dtype)
    image = torch.rand(1, 3, 6, 8)
    sr = loaded(image.to(dtype))
    assert sr.dtype == dtype
    assert (sr.float() - model.upscale(image)).abs().mean() < 0.02


def test_weights_of_other_networks_are_left_to_others(spandrel):
    ours = {name: spandrel.MAIN_REGISTRY[name] for name in SIZES}
    edsr = build("EDSR").state_dict()
    others = [
        {**edsr, "body.0.body.3.conv_du.0.weight": torch.zeros(1)},  # RCAN has the keys of EDSR, and more
        {key: value for key, value in edsr.items() if "body.1" not in key},
        {**edsr, "head.0.weight": torch.zeros(8, 3, 1, 1)},
        build("SMSR").state_dict() | {"tail.0.bias": torch.zeros(3)},
        {"conv.weight": torch.zeros(1, 1, 3, 3)},
        {},
    ]
    for state_dict in others:
        assert not any(support.detect(state_dict) for support in ours.values())
    assert ours["SMSR"].detect(build("SMSR").state_dict())
    assert not ours["SMSR"].detect(edsr)
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_state_dict(others[1])


def test_no_architecture_of_the_package_claims_our_weights(spandrel):
    for name in SIZES:
        claimed = [
            s.architecture.id for s in spandrel.MAIN_REGISTRY if s.detect(build_model(name, scale=2).state_dict())
        ]
        assert claimed == [name]


def test_published_weights_load(spandrel, shared):
    loaded = spandrel.ModelLoader().load_from_state_dict(
        torch.load(shared / "reference/SMSR_X2.pt", map_location="cpu")
    )
    assert (loaded.architecture.id, loaded.scale) == ("SMSR", 2)
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 8, 9), np.float32))
    torch.testing.assert_close(loaded(image), loaded.model.upscale(image))


def test_the_error_without_the_package_names_it():
    program = "import sys; sys.modules['spandrel'] = None; import model.spandrel"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("program.InputError: the spandrel package cannot be imported (")
    assert last.endswith("; pip install spandrel")
