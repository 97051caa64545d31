import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from loss import vgg
from program import InputError


@pytest.fixture
def weights(torchvision, tmp_path):
    torch.save(torchvision.models.vgg19().state_dict(), tmp_path / "vgg19.pth")
    return tmp_path / "vgg19.pth"


@pytest.mark.parametrize(("name", "channels", "factor"), [("VGG22", 128, 2), ("VGG54", 512, 16)])
def test_loss_is_the_distance_between_features_of_normalized_images(weights, torchvision, name, channels, factor):
    sr, hr = (torch.rand(1, 3, 32, 32) * 255).requires_grad_(), torch.rand(1, 3, 32, 32) * 255
    loss = vgg.VGG(name, rgb_range=255, weights=weights)
    value = loss(sr, hr)
    value.backward()
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    features = [loss.features(normalize(image / 255)) for image in (sr, hr)]
    assert features[0].shape == (1, channels, 32 // factor, 32 // factor)
    torch.testing.assert_close(value, F.mse_loss(*features))
    assert sr.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    assert isinstance(loss.features[-1], torch.nn.Conv2d)  # EDSR compares before the ReLU


def test_files_without_weights_are_refused(torchvision, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name, problem in (
        ("text.pth", "cannot be read as weights .broken or cut off.; give the file that torchvision downloads"),
        ("absent.pth", "no such weights file; check the path"),
        ("other.pth", r"not torchvision's VGG19 weights: features.0.weight is \(1,\), not .*; give the file"),
    ):
        with pytest.raises(InputError, match=f"{name}: {problem}") as error:
            vgg.VGG("VGG54", weights=tmp_path / name)
        assert error.value.argument is None


def test_a_failed_download_is_reported(torchvision, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "vgg19", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no route to host\); give a file") as error:
        vgg.VGG("VGG54")
    assert error.value.argument == "vgg_weights"


def test_the_error_without_torchvision_names_the_package_to_install():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import main, program\n"
        "from loss import build_loss\n"
        "build_loss('L1+MSE+GAN')\n"
        "try: build_loss('VGG54')\n"
        "except program.InputError as error: print(error.argument, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("loss VGG needs torchvision")
    assert "pip install torchvision" in done.stdout
