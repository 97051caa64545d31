"""Layers and helpers that every network here shares."""

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from utility import InputError

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


def check_images(x, n_colors):
    """Raise InputError unless x is (N, n_colors, H, W), without NaN and infinity."""
    if x.ndim != 4 or x.shape[1] != n_colors:
        raise InputError(f"images are (N, {n_colors}, H, W) for this network, and not {tuple(x.shape)}")
    if not x.isfinite().all():
        image, channel, row, column = x.isfinite().logical_not().nonzero()[0].tolist()
        value = x[image, channel, row, column].item()
        raise InputError(f"image {image} of the batch is {value} at row {row}, column {column}, channel {channel}")


@dataclass(frozen=True)
class Work:
    """What one or several forward passes cost. Costs add up: `work + work`.

    pixels      low-resolution pixels that were run, padding and overlaps included
    macs        multiply-adds of the convolutions that the masks ask for, as the paper counts them
    macs_dense  multiply-adds of the same network with nothing skipped
    macs_run    multiply-adds that were executed: those of `macs`, and what it took to skip the others
    important   important pixels in the mask of each SMM; empty for a dense network
    active      active share of the sparse convolutions (1: nothing skipped), times `pixels`
    masks       of each SMM, bool (N, 1, H, W), true where a pixel is important; none in a sum
    """

    pixels: int
    macs: int
    macs_dense: int
    macs_run: int
    important: tuple[int, ...] = ()
    active: float = 0.0
    masks: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)

    def __add__(self, other):
        return Work(
            self.pixels + other.pixels,
            self.macs + other.macs,
            self.macs_dense + other.macs_dense,
            self.macs_run + other.macs_run,
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


@dataclass(frozen=True)
class Strip:
    """Lines top...bottom of some images of a batch; of one image, or all lines of all of them."""

    first: int
    last: int
    top: int
    bottom: int

    def widened(self, lines, height):
        """With so many lines more above and below, as far as an image of `height` lines has them."""
        return replace(self, top=max(0, self.top - lines), bottom=min(height, self.bottom + lines))

    def of(self, x, scale=1):
        """The strip of x (N, ..., scale H, scale W)."""
        return x[self.first : self.last, ..., self.top * scale : self.bottom * scale, :]

    def within(self, wider, x, scale=1):
        """The strip of x (n, ..., scale h, scale W), which is the strip `wider`."""
        return x[..., (self.top - wider.top) * scale : (self.bottom - wider.top) * scale, :]

    def rows(self, shape):
        """The strip as a range of the pixels of (N, H, W), counted in that order."""
        _, height, width = shape
        return range((self.first * height + self.top) * width, ((self.last - 1) * height + self.bottom) * width)


def strips(n, height, width, tile=None):
    """Cut n images into strips of about tile x tile pixels, alike in height; into one of all where that is enough.

    Cuts are at even lines, so that pooling by 2 sees the same pairs. A strip has 144 x 144 pixels or, as lines are
    whole, little less: for very few numbers PyTorch convolves on a CPU with another library, and rounds differently.
    """
    pixels = math.inf if tile is None else max(tile, 144) ** 2
    if n * height * width <= pixels:
        return [Strip(0, n, 0, height)]
    count = max(1, min(height // 2, height * width // pixels))
    tops = [*(height * part // count // 2 * 2 for part in range(count)), height]
    return [Strip(i, i + 1, top, bottom) for i in range(n) for top, bottom in itertools.pairwise(tops)]


def by_strips(function, x, cuts, halo, scale=1, out=None):
    """function(x), strip by strip, for one that maps (N, ., H, W) to (N, ., scale H, scale W) and sees `halo` lines.

    Writes into `out` if there is one.
    """
    if len(cuts) == 1 and out is None:
        return function(x)
    for cut in cuts:
        near = cut.widened(halo, x.shape[2])
        part = cut.within(near, function(near.of(x)), scale)
        if out is None:
            shape = (len(x), part.shape[1], x.shape[2] * scale, x.shape[3] * scale)
            out = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=torch.channels_last)
        cut.of(out, scale).copy_(part)
    return out
