"""Layers and helpers that the networks share."""

import torch
import torch.nn.functional as F
from torch import nn

from program import InputError

DIV2K_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of the DIV2K training set, images in 0...1


def conv3x3(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def mean_color(n_colors: int, rgb_range: float) -> torch.Tensor:
    """The DIV2K mean, (1, n_colors, 1, 1) in 0...rgb_range; the average of its channels for images that are not RGB."""
    mean = torch.tensor(DIV2K_RGB_MEAN)
    if n_colors != len(mean):
        mean = mean.mean().repeat(n_colors)
    return mean.view(1, n_colors, 1, 1) * rgb_range


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Replicate the last row and column of x (N, C, H, W) until H and W are multiples of `multiple`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def check_images(x: torch.Tensor, n_colors: int) -> None:
    """Raise InputError unless x is (N, n_colors, H, W), not empty, and neither sparse nor without data."""
    if x.layout != torch.strided or x.is_meta:
        raise InputError(f"this network takes dense tensors with data, not {x.layout} on {x.device}; convert them")
    if x.ndim != 4 or x.shape[1] != n_colors or not x.numel():
        raise InputError(f"this network takes images (N, {n_colors}, H, W), not {tuple(x.shape)}; reshape them")


def check_finite(x: torch.Tensor) -> None:
    """Raise InputError if images x (N, n_colors, H, W) contain NaN or infinity. Waits for the device."""
    if not x.isfinite().all():
        image, channel, row, column = x.isfinite().logical_not().nonzero()[0].tolist()
        value = x[image, channel, row, column].item()
        raise InputError(
            f"image {image} of the batch is {value} at row {row}, column {column}, channel {channel}; "
            "pass finite pixels"
        )


def bicubic_weights(scale: int, n_colors: int) -> torch.Tensor:
    """Bicubic upscaling as a 5x5 convolution before a pixel shuffle: (n_colors scale^2, n_colors, 5, 5)."""
    points = torch.eye(25).view(25, 1, 5, 5)  # each of the 5 x 5 input pixels alone
    spread = F.interpolate(points, scale_factor=scale, mode="bicubic", align_corners=False)
    middle = slice(2 * scale, 3 * scale)  # the s x s output pixels of the middle one
    kernel = spread[:, 0, middle, middle].reshape(5, 5, -1).permute(2, 0, 1)  # (s^2, 5, 5)
    weights = torch.zeros(n_colors, scale**2, n_colors, 5, 5)
    for color in range(n_colors):
        weights[color, :, color] = kernel
    return weights.flatten(0, 1)
