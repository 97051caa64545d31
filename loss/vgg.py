"""Perceptual loss: the distance between VGG19 features ("Perceptual Losses ...", ECCV 2016; SRGAN eq. 5)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import schema
from loading import load_tensors
from program import InputError
from utility import TORCHVISION_ADVICE

# Number of layers of VGG19 that compute the features. VGG<i><j> are those of the j-th convolution (before its ReLU)
# before the i-th max pooling.
VGG_LAYERS = {"VGG22": 8, "VGG54": 35}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """Mean squared difference between the VGG19 features of SR and HR, both (N, 3, H, W) in 0...rgb_range.

    Args:
        name: a key of VGG_LAYERS
        weights: file of torchvision's VGG19 weights; None: use torchvision's cache or download them

    Raises:
        InputError: torchvision cannot be imported, or the weights cannot be read or downloaded
    """

    def __init__(self, name: str, rgb_range: float = 255, weights: str | Path | None = None):
        super().__init__()
        self.features = _vgg19(weights).features[: VGG_LAYERS[name]].requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * rgb_range, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * rgb_range, persistent=False)

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.features((hr - self.mean) / self.std)
        return F.mse_loss(self.features((sr - self.mean) / self.std), target)


def _vgg19(weights):
    try:
        from torchvision.models import VGG19_Weights, vgg19
    except (ImportError, RuntimeError) as error:  # RuntimeError: PyPI's torchvision with a CPU-only PyTorch
        problem = f"VGG needs torchvision, which cannot be imported here ({error})"
        raise InputError(f"{problem}; {TORCHVISION_ADVICE}", argument="loss") from None
    if weights is None:
        try:
            return vgg19(weights=VGG19_Weights.IMAGENET1K_V1)
        except OSError as error:
            raise InputError(
                f"the VGG19 weights cannot be downloaded ({error}); give a file that holds them",
                argument="vgg_weights",
            ) from None
    advice = "give the file that torchvision downloads"
    state_dict, model = load_tensors(weights, advice), vgg19()
    wanted = schema.tensors_like(model.state_dict(), finite=True)
    schema.check(state_dict, wanted, f"{weights}: not torchvision's VGG19 weights", advice)
    model.load_state_dict(state_dict)
    return model
