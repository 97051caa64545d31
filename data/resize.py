"""Bicubic resizing as MATLAB's imresize does it: the LR images of the field."""

import numpy as np
import torch
import torch.nn.functional as F


def downscale(image, scale):
    """uint8 (H, W, C), H and W multiples of the whole number `scale` -> uint8 (H / scale, W / scale, C).

    Down the columns first, rounded to 8 bits, then along the rows, as imresize on a uint8 image; the border is
    mirrored. Halves are rounded up as MATLAB does, which at x2, where the weights are dyadic, is a pixel in a hundred.

    Raises ValueError if a side is no multiple of the scale.
    """
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"{height}x{width} pixels cannot be divided by {scale}")
    return _resize(_resize(image, height // scale, axis=0), width // scale, axis=1)


def upscale(image, scale):
    """uint8 (H, W, C) -> uint8 (scale H, scale W, C): the method "bicubic" of papers."""
    height, width = image.shape[:2]
    return _resize(_resize(image, height * scale, axis=0), width * scale, axis=1)


def _resize(image, length, axis):
    """One axis to `length`, a multiple or a part of what it is."""
    margin = 3 * max(1, image.shape[axis] // length)  # input pixels; the kernel reaches over two, or two output pixels
    padding = [(0, 0)] * 3
    padding[axis] = (margin, margin)
    padded = torch.from_numpy(np.pad(image, padding, mode="symmetric").transpose(2, 0, 1)[None].astype(np.float32))
    size = list(padded.shape[2:])
    size[axis] = size[axis] * length // image.shape[axis]
    resized = F.interpolate(padded, size, mode="bicubic", antialias=True, align_corners=False)[0]
    resized = (resized.clamp(0, 255) + 0.5).floor().byte().permute(1, 2, 0).numpy()
    margin = (size[axis] - length) // 2
    kept = slice(margin, -margin)
    return resized[kept] if axis == 0 else resized[:, kept]


def crop_to_multiple(image, scale):
    """Cut rows at the bottom and columns at the right until both sides are multiples of `scale`."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]
