from pathlib import Path

import pytest
import torch

from model import build_model, load_model
from program import InputError
from tools.convert_weights import main


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_converted_weights_give_the_same_images(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("safetensors")
    model = build_model("EDSR", scale=2, n_feats=8, n_resblocks=2, res_scale=0.1, rgb_range=1).eval()
    state = {f"module.{key}": value for key, value in model.to(memory_format=torch.channels_last).state_dict().items()}
    torch.save({"params": state}, "w.pth.tar")
    main(["--pre_train", "w.pth.tar", "--output", f"out.{suffix}"])
    loaded = load_model(f"out.{suffix}")
    x = torch.rand(1, 3, 6, 5)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_settings_that_weights_lack_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model("EDSR", scale=2, n_feats=8, n_resblocks=1)
    torch.save({k: v for k, v in model.state_dict().items() if k not in model.settings}, "old.pt")
    main(["--pre_train", "old.pt", "--output", "new.pt", "--rgb_range", "1", "--res_scale", "0.1"])
    new = load_model("new.pt")
    assert (float(new.rgb_range), float(new.res_scale)) == (1, pytest.approx(0.1))


def test_mistakes(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny.state_dict(), "w.pt")
    for line, message in (
        ("--pre_train w.pt --output w.onnx", r"'w\.onnx' does not end with \.pt or \.pth or \.safetensors"),
        ("--pre_train w.pt --output w.pt", r"--output w\.pt: already exists; choose another name"),
        ("--pre_train absent.pt --output new.pt", r"absent\.pt: no such weights file"),
    ):
        with pytest.raises(InputError, match=message):
            main(line.split())
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["w.pt"]
