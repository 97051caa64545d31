"""Bicubic resizing like MATLAB's imresize, which the published LR images were made with."""

import numpy as np
import torch
import torch.nn.functional as F


def downscale(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (H, W, C), H and W multiples of the integer `scale` -> uint8 (H / scale, W / scale, C).

    Like imresize on a uint8 image, this resizes along the columns, rounds to 8 bits and then resizes along the rows,
    with mirrored borders. Halves are rounded up as in MATLAB; at x2, where the weights are dyadic, about 1 % of the
    pixels depend on it.

    Raises ValueError if H or W is not a multiple of the scale.
    """
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"{height}x{width} pixels cannot be divided by {scale}; crop the image to a multiple")
    return _resize(_resize(image, height // scale, axis=0), width // scale, axis=1)


def upscale(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 (scale H, scale W, C): the baseline that papers call "bicubic"."""
    height, width = image.shape[:2]
    return _resize(_resize(image, height * scale, axis=0), width * scale, axis=1)


def crop_to_multiple(image: np.ndarray, scale: int) -> np.ndarray:
    """(H, W, C) -> a view without the last rows and columns, so that both sides are multiples of `scale`."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def _resize(image, length, axis):
    """Resize one axis to `length`, a multiple or a divisor of its present length."""
    margin = 3 * max(1, image.shape[axis] // length)  # input pixels; the kernel reaches over 2 input or 2 output pixels
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
