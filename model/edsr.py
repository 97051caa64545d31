"""EDSR: "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPRW 2017.

With 16 blocks of 64 channels it is EDSR-baseline, the network without masks to compare with. Modules have the names
that the published checkpoints use, so those checkpoints load.
"""

import math

import torch
from torch import nn

from model.common import check_finite, check_images, conv3x3
from model.network import Cost, Network, conv_macs, count_modules, drop_mean_shifts, stored_settings
from model.tiling import Tile, map_tiles, split_into_tiles
from program import InputError


class ResBlock(nn.Module):
    """conv, ReLU, conv, scaled and added to the input (N, C, H, W) (paper fig. 2c)."""

    def __init__(self, n_feats: int, res_scale: float):
        super().__init__()
        self.body = nn.Sequential(conv3x3(n_feats, n_feats), nn.ReLU(), conv3x3(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) * self.res_scale


def build_upsampler(scale: int, n_feats: int) -> nn.Sequential:
    """(N, C, H, W) -> (N, C, scale H, scale W): doubled or tripled until the scale, 2^n or 3^n, is reached."""
    factor = 3 if scale % 3 == 0 else 2
    steps = round(math.log(scale, factor))
    if scale != factor**steps:
        raise ValueError(f"EDSR upscales by powers of 2 or 3, not by {scale}")
    layers = []
    for _ in range(steps):
        layers += [conv3x3(n_feats, n_feats * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


class Tail(nn.Sequential):
    """Features (N, C, H, W) -> images (N, n_colors, scale H, scale W)."""

    def __init__(self, n_feats: int, n_colors: int, scale: int):
        super().__init__(build_upsampler(scale, n_feats), conv3x3(n_feats, n_colors))

    @property
    def upsampler(self) -> nn.Sequential:
        return self[0]

    @property
    def conv(self) -> nn.Conv2d:
        return self[1]


class EDSR(Network):
    """Images go in and out as (N, n_colors, H, W) in 0...rgb_range, any H and W >= 1.

    Args:
        scale: upscaling factor, a power of 2 or 3
        n_feats: feature channels
        n_resblocks: residual blocks
        res_scale: factor of each residual branch, saved with the weights
        n_colors: image channels
        rgb_range: largest pixel value, saved with the weights
    """

    settings = ("rgb_range", "res_scale")

    def __init__(
        self,
        scale: int,
        n_feats: int = 64,
        n_resblocks: int = 16,
        res_scale: float = 1.0,
        n_colors: int = 3,
        rgb_range: float = 255,
    ):
        super().__init__(scale, n_feats, n_colors, rgb_range)
        self.peak_maps = 3 * scale**2 + 1  # feature maps that inference holds at its peak; most at full resolution
        self.register_buffer("res_scale", torch.tensor(float(res_scale)))
        self.head = nn.Sequential(conv3x3(n_colors, n_feats))
        blocks = [ResBlock(n_feats, res_scale) for _ in range(n_resblocks)]
        self.body = nn.Sequential(*blocks, conv3x3(n_feats, n_feats))
        self.tail = Tail(n_feats, n_colors, scale)

    def _apply_settings(self) -> None:
        super()._apply_settings()
        res_scale = stored_settings(EDSR, {"res_scale": self.res_scale})["res_scale"]
        for block in self.body[:-1]:
            block.res_scale = res_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """LR images -> SR images (N, n_colors, scale H, scale W), not clamped."""
        return self._forward(x, split_into_tiles(len(x), *x.shape[2:]))

    def _forward(self, x: torch.Tensor, tiles: list[Tile]) -> torch.Tensor:
        f = head = map_tiles(self.head, x - self.mean, tiles, halo=1)
        for block in self.body:
            f = map_tiles(block, f, tiles, halo=2)
        return map_tiles(self.tail, head + f, tiles, halo=2, scale=self.scale) + self.mean

    def training_forward(self, x: torch.Tensor, tau: float | torch.Tensor | None) -> tuple[torch.Tensor, list]:
        """SR images and an empty list: EDSR has no masks, so tau is ignored."""
        return self(x), []

    @torch.no_grad()
    def inference(self, x: torch.Tensor, mode: str = "auto", tile: int | None = None) -> tuple[torch.Tensor, Cost]:
        """LR images -> SR images and their cost, without gradients.

        tile: run layers on strips of about tile x tile pixels to save memory; the result is the same.
        Raises InputError for the mode "sparse", and if the images contain NaN or infinity.
        """
        if mode not in ("auto", "dense"):
            raise InputError(f"EDSR skips nothing and has no mode {mode!r}; use auto or dense", argument="inference")
        check_images(x, self.n_colors)
        check_finite(x)
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        macs = pixels * self._macs_per_pixel()
        cost = Cost(pixels=pixels, macs=macs, macs_dense=macs, macs_run=macs, active=pixels)
        return self._forward(x, split_into_tiles(len(x), *x.shape[2:], tile)), cost

    def _macs_per_pixel(self) -> int:
        macs, resolution = conv_macs(self.head) + conv_macs(self.body), 1
        for layer in [*self.tail.upsampler, self.tail.conv]:
            macs += conv_macs(layer) * resolution
            if isinstance(layer, nn.PixelShuffle):
                resolution *= layer.upscale_factor**2
        return macs

    @staticmethod
    def hyperparameters(state_dict: dict[str, torch.Tensor]) -> dict[str, float]:
        """The constructor arguments that a translated state dict records; KeyError if it is not of this network."""
        n_feats, n_colors = state_dict["head.0.weight"].shape[:2]
        state_dict["tail.1.weight"]  # a KeyError unless this is an EDSR: SMSR has head.0.weight too
        steps = [key for key in state_dict if key.startswith("tail.0.") and key.endswith(".weight")]
        factors = [math.isqrt(state_dict[key].shape[0] // n_feats) for key in steps]
        return {
            "scale": math.prod(factors),
            "n_feats": n_feats,
            "n_resblocks": count_modules(state_dict, "body.") - 1,  # the last one is the convolution after the blocks
            "n_colors": n_colors,
            **stored_settings(EDSR, state_dict),
        }

    @staticmethod
    def translate(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop the mean shifts of published checkpoints; their other keys are ours already."""
        return drop_mean_shifts(state_dict)
