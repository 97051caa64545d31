"""Layers and helpers that every network here shares."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MEAN_SHIFTS = ("sub_mean.", "add_mean.")  # constants, kept as convolutions in published checkpoints, not here
DIV2K_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of the DIV2K training set, images in 0...1


def conv3x3(in_channels, out_channels, bias=True):
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def mean_color(n_colors, rgb_range):
    """The DIV2K mean as a tensor (1, n_colors, 1, 1) in 0...rgb_range; its average where the image is not RGB."""
    mean = torch.tensor(DIV2K_RGB_MEAN)
    if n_colors != len(mean):
        mean = mean.mean().repeat(n_colors)
    return mean.view(1, n_colors, 1, 1) * rgb_range


def pad_to_multiple(x, multiple):
    """Replicate the last row and column of x (N, C, H, W) until H and W are multiples of `multiple`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@dataclass(frozen=True)
class Work:
    """What one or several forward passes cost. Costs add up: `work + work`.

    pixels      low-resolution pixels that were run, padding and overlaps included
    macs        multiply-adds of the convolutions that were executed
    macs_dense  multiply-adds of the same network with nothing skipped
    important   important pixels in the mask of each SMM; empty for a dense network
    active      active share of the sparse convolutions (1: nothing skipped), times `pixels`
    """

    pixels: int
    macs: int
    macs_dense: int
    important: tuple[int, ...] = ()
    active: float = 0.0

    def __add__(self, other):
        return Work(
            self.pixels + other.pixels,
            self.macs + other.macs,
            self.macs_dense + other.macs_dense,
            tuple(a + b for a, b in zip(self.important, other.important, strict=True)),
            self.active + other.active,
        )

    @property
    def mask_density(self):
        """Share of important pixels in each SMM, 0...1."""
        return [count / self.pixels for count in self.important]

    @property
    def active_share(self):
        """Share of the work of the sparse convolutions that was done, 0...1."""
        return self.active / self.pixels


def conv_macs(module):
    """Multiply-adds of all convolutions in `module` for every pixel of the grid they write to."""
    return sum(
        conv.in_channels * conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    )
