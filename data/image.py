"""Image files as plain 8-bit arrays, for training and benchmarks. picture.py does the reading."""

from pathlib import Path

import numpy as np

from files import write_whole
from picture import Picture, decode, encode_png, image_kind, image_size, list_images, to_8_bits, to_colors

__all__ = ["image_kind", "image_size", "list_images", "read_image", "write_png"]


def read_image(path: Path, n_colors: int = 3) -> np.ndarray:
    """Read an image file -> uint8 (H, W, n_colors), n_colors 1 (gray) or 3 (RGB). The array may be read-only.

    Values are those stored, as MATLAB reads them: color profiles of gray and RGB images are not applied. Alpha is
    dropped, 16 bits are rounded to 8. Raises InputError as `picture.decode` does.
    """
    return to_colors(to_8_bits(decode(path).pixels), n_colors)


def write_png(path: Path, image: np.ndarray | Picture) -> None:
    """Write a picture, or its pixels alone, as a PNG file, completely or not at all."""
    write_whole(path, encode_png(image if isinstance(image, Picture) else Picture(image)))
