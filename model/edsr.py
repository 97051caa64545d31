"""EDSR: "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPRW 2017.

With 16 blocks of 64 channels it is EDSR-baseline, the dense network that a user would pick instead. Modules bear the
names of the published checkpoints, so those load.
"""

import math

import torch
from torch import nn

from model.common import MEAN_SHIFTS, Work, by_strips, check_images, conv3x3, conv_macs, mean_color, strips
from utility import InputError


class ResBlock(nn.Module):
    """conv, ReLU, conv, scaled and added to the input (N, C, H, W) (paper fig. 2c)."""

    def __init__(self, n_feats, res_scale):
        super().__init__()
        self.body = nn.Sequential(conv3x3(n_feats, n_feats), nn.ReLU(), conv3x3(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x):
        return x + self.body(x) * self.res_scale


def upsampler(scale, n_feats):
    """(N, C, H, W) -> (N, C, scale H, scale W): doubled or tripled until the scale, 2^n or 3^n, is reached."""
    factor = 3 if scale % 3 == 0 else 2
    steps = round(math.log(scale, factor))
    if scale != factor**steps:
        raise ValueError(f"EDSR upscales by powers of 2 or of 3, not by {scale}")
    layers = []
    for _ in range(steps):
        layers += [conv3x3(n_feats, n_feats * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


class EDSR(nn.Module):
    """Images go in and out as (N, n_colors, H, W) in 0...rgb_range, any H and W >= 1.

    Args:
        scale: upscaling factor, a power of 2 or of 3
        n_feats: feature channels
        n_resblocks: residual blocks
        res_scale: factor of each residual branch
        n_colors: image channels
        rgb_range: largest pixel value
    """

    def __init__(self, scale, n_feats=64, n_resblocks=16, res_scale=1.0, n_colors=3, rgb_range=255):
        super().__init__()
        self.scale, self.n_feats = scale, n_feats
        self.peak_maps = 3 * scale**2 + 1  # of features that inference holds in memory at a time; most at full size
        self.register_buffer("mean", mean_color(n_colors, rgb_range), persistent=False)
        self.head = nn.Sequential(conv3x3(n_colors, n_feats))
        blocks = [ResBlock(n_feats, res_scale) for _ in range(n_resblocks)]
        self.body = nn.Sequential(*blocks, conv3x3(n_feats, n_feats))
        self.tail = nn.Sequential(upsampler(scale, n_feats), conv3x3(n_feats, n_colors))

    def forward(self, x):
        """LR images -> SR images (N, n_colors, scale H, scale W), not clamped."""
        return self._forward(x, strips(len(x), *x.shape[2:]))

    def _forward(self, x, cuts):
        f = head = by_strips(self.head, x - self.mean, cuts, halo=1)
        for block in self.body:
            f = by_strips(block, f, cuts, halo=2)
        return by_strips(self.tail, head + f, cuts, halo=2, scale=self.scale) + self.mean

    def training_forward(self, x, tau):
        """SR images and no masks: a dense network has no temperature and no sparsity."""
        return self(x), []

    @torch.no_grad()
    def inference(self, x, mode="dense", tile=None):
        """LR images -> SR images and what they cost (common.Work).

        tile: run layers on strips of about tile x tile pixels, to need less memory; the result is the same.
        Raises InputError for another mode, and if the images hold NaN or infinity.
        """
        if mode not in ("auto", "dense"):
            raise InputError(f"EDSR has nothing to skip: --inference {mode} is for SMSR")
        check_images(x, self.mean.shape[1])
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        macs = pixels * self._macs_per_pixel()
        return self._forward(x, strips(len(x), *x.shape[2:], tile)), Work(pixels, macs, macs, macs, active=pixels)

    def _macs_per_pixel(self):
        macs, resolution = conv_macs(self.head) + conv_macs(self.body), 1
        for layer in [*self.tail[0], self.tail[1]]:
            macs += conv_macs(layer) * resolution
            if isinstance(layer, nn.PixelShuffle):
                resolution *= layer.upscale_factor**2
        return macs

    @staticmethod
    def hyperparameters(state_dict):
        """The constructor arguments that the shapes of a state dict tell; KeyError if it is not of this network."""
        n_feats, n_colors = state_dict["head.0.weight"].shape[:2]
        state_dict["tail.1.weight"]
        steps = [key for key in state_dict if key.startswith("tail.0.") and key.endswith(".weight")]
        factors = [math.isqrt(state_dict[key].shape[0] // n_feats) for key in steps]
        blocks = [int(key.split(".")[1]) for key in state_dict if key.startswith("body.") and key.endswith(".weight")]
        return {
            "scale": math.prod(factors),
            "n_feats": n_feats,
            "n_resblocks": max(blocks),  # the last one is the convolution behind the blocks
            "n_colors": n_colors,
        }

    @staticmethod
    def translate(state_dict):
        """Drop the mean shifts that published checkpoints keep as convolutions; other keys are ours already."""
        return {key: value for key, value in state_dict.items() if not key.startswith(MEAN_SHIFTS)}
