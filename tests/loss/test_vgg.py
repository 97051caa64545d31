import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from loss import vgg
from utility import InputError


@pytest.fixture(scope="module")
def torchvision():
    """torchvision, also where its compiled operators do not fit PyTorch: those it asks for at import are declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision

            torchvision.declared = library  # a library that is collected takes its operators along
            return torchvision
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            library.define(f"{missing[1]}() -> ()")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


@pytest.fixture
def weights(torchvision, tmp_path):
    torch.save(torchvision.models.vgg19().state_dict(), tmp_path / "vgg19.pth")
    return tmp_path / "vgg19.pth"


@pytest.mark.parametrize(("name", "channels", "shrunk"), [("VGG22", 128, 2), ("VGG54", 512, 16)])
def test_distance_of_the_features_of_normalized_images(weights, torchvision, name, channels, shrunk):
    sr, hr = (torch.rand(1, 3, 32, 32) * 255).requires_grad_(), torch.rand(1, 3, 32, 32) * 255
    loss = vgg.VGG(name, rgb_range=255, weights=weights)
    value = loss(sr, hr)
    value.backward()
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    features = [loss.features(normalize(image / 255)) for image in (sr, hr)]
    assert features[0].shape == (1, channels, 32 // shrunk, 32 // shrunk)
    torch.testing.assert_close(value, F.mse_loss(*features))
    assert sr.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    assert isinstance(loss.features[-1], torch.nn.Conv2d)  # EDSR compares before the ReLU


def test_weights_that_are_none(torchvision, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pth"):
        vgg.VGG("VGG54", weights=tmp_path / "text.pth")


def test_without_torchvision_the_line_says_what_to_install():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import main, utility\n"
        "from loss import build_loss\n"
        "build_loss('L1+MSE+GAN')\n"
        "try: build_loss('VGG54')\n"
        "except utility.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torchvision" in done.stdout
