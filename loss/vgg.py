"""Perceptual loss: distance of VGG19 features ("Perceptual Losses ...", ECCV 2016; SRGAN eq. 5)."""

import torch
import torch.nn.functional as F
from torch import nn

from utility import InputError

CUTS = {"VGG22": 8, "VGG54": 35}  # layers of VGG19 up to the features of a pooling block and a convolution in it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """Mean squared difference of the VGG19 features of SR and HR, both (N, 3, H, W) in 0...rgb_range.

    Args:
        name: a key of CUTS
        weights: file of torchvision's VGG19 weights; None: torchvision's cache, or its download

    Raises:
        InputError: torchvision cannot be imported, or there are no weights
    """

    def __init__(self, name, rgb_range=255, weights=None):
        super().__init__()
        self.features = _vgg19(weights).features[: CUTS[name]].requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * rgb_range, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * rgb_range, persistent=False)

    def forward(self, sr, hr):
        with torch.no_grad():
            target = self.features((hr - self.mean) / self.std)
        return F.mse_loss(self.features((sr - self.mean) / self.std), target)


def _vgg19(weights):
    try:
        from torchvision.models import VGG19_Weights, vgg19
    except (ImportError, RuntimeError) as error:  # PyPI's torchvision on a CPU-only PyTorch: a RuntimeError
        raise InputError(
            f"--loss VGG needs torchvision, which cannot be imported here ({error}); install the build that fits "
            f"this PyTorch: pip install torchvision --index-url https://download.pytorch.org/whl/<cpu, cu126, ...>"
        ) from None
    if weights is None:
        try:
            return vgg19(weights=VGG19_Weights.IMAGENET1K_V1)
        except OSError as error:
            raise InputError(f"--loss VGG: no weights, and no download ({error}); say --vgg_weights PATH") from None
    model = vgg19()
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception:  # a broken file may raise nearly anything
        raise InputError(f"--vgg_weights {weights}: cannot be read as torchvision's VGG19 weights") from None
    return model
