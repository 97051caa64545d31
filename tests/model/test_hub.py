"""Folders of Hugging Face, written and read by us and by huggingface_hub itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import EDSR, SMSR, build_model
from model.hub import write_hub_folder
from model.weights import write_weights
from program import InputError

pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "SMSR": {"n_feats": 8, "n_blocks": 3, "n_layers": 2},
    "EDSR": {"n_feats": 8, "n_resblocks": 2, "res_scale": 0.1},
}


def build(name, **sizes):
    return build_model(name, **{"scale": 3, "n_colors": 1, "rgb_range": 1} | SIZES[name] | sizes).eval()


@pytest.fixture
def folder(tmp_path):
    write_hub_folder(tmp_path / "hub", build("SMSR"))
    return tmp_path / "hub"


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("network", [SMSR, EDSR])
def test_networks_survive_a_folder(tmp_path, network):
    model = build(network.__name__)
    write_hub_folder(tmp_path / "hub", model)
    loaded = network.from_pretrained(tmp_path / "hub")
    assert type(loaded) is network
    assert not loaded.training
    x = torch.rand(2, 1, 5, 6)
    torch.testing.assert_close(loaded(x), model(x))
    assert set(loaded.settings) <= json.loads((tmp_path / "hub/config.json").read_text()).keys()


def test_settings_that_weights_of_version_0_1_0_lack_come_from_the_config(tmp_path, folder):
    model = build("SMSR")
    state_dict = {key: value for key, value in model.state_dict().items() if key != "rgb_range"}
    write_weights(folder / "model.safetensors", state_dict)
    assert float(SMSR.from_pretrained(str(folder)).rgb_range) == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["EDSR"]}, "describes EDSR, not SMSR; call from_pretrained of EDSR"),
        ({"architectures": "SMSR"}, "architectures is 'SMSR', not a list"),
        ({"scale": 2}, "holds SMSR weights for scale 3, not 2; use scale 3, or other weights"),
        ({"n_blocks": 10**12}, r"holds SMSR weights for n_blocks 3, not 1e\+12"),
        ({"n_feats": "64"}, "n_feats is '64', not an integer >= 1"),
        ({"scale": -1}, "scale is -1, not an integer >= 1"),
        ({"rgb_range": -1}, "rgb_range is -1, not a finite number"),
    ],
)
def test_folders_that_do_not_fit_together_are_refused(folder, entries, message):
    change_config(folder, **entries)
    with pytest.raises(InputError, match=message) as error:
        SMSR.from_pretrained(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused(folder):
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"config\.json: it is \[1, 2\], not a mapping; use a folder"):
        SMSR.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: No such file or directory; use a folder that"):
        SMSR.from_pretrained(folder)
    (folder / "config.json").write_text("{}")
    write_weights(folder / "model.safetensors", build("EDSR").state_dict())
    with pytest.raises(InputError, match=r"model\.safetensors: not weights of SMSR"):
        SMSR.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read as weights"):
        SMSR.from_pretrained(folder)


def test_sources_that_are_no_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"owner/name: no such folder; to download it .* pip install huggingface_hub"):
        SMSR.from_pretrained("owner/name")
    with pytest.raises(InputError, match="absent: no such folder; check the path"):
        SMSR.from_pretrained(tmp_path / "absent")


# ---- with huggingface_hub --------------------------------------------------------------------------------------------


def test_huggingface_hub_reads_and_writes_the_same_folders(tmp_path, folder):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class FromHub(huggingface_hub.PyTorchModelHubMixin, SMSR):
        pass

    model = FromHub.from_pretrained(folder)
    x = torch.rand(1, 1, 5, 6)
    expected = SMSR.from_pretrained(folder)(x)
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(SMSR.from_pretrained(tmp_path / "saved")(x), expected)


def test_repositories_in_the_cache_are_found_without_a_network(tmp_path, folder):
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache/models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    program = (
        "from model import SMSR\n"
        "print(SMSR.from_pretrained('owner/name').scale)\n"
        "try:\n"
        "    SMSR.from_pretrained('owner/other')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    scale, message = done.stdout.splitlines()
    assert scale == "3"
    assert message.startswith("InputError owner/other: no such folder, and it cannot be downloaded from Hugging Face (")
