"""Strips of images with their halos, for layers that run on a part of an image at a time."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Rows top...bottom of the images first...last of a batch: a strip of one image, or all rows of several images."""

    first: int
    last: int
    top: int
    bottom: int

    def grow(self, halo: int, height: int) -> "Tile":
        """The tile with `halo` more rows above and below, as far as an image of `height` rows has them."""
        return replace(self, top=max(0, self.top - halo), bottom=min(height, self.bottom + halo))

    def crop(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Cut the tile out of x (N, ..., scale H, scale W)."""
        return x[self.first : self.last, ..., self.top * scale : self.bottom * scale, :]

    def crop_from(self, wider: "Tile", x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Cut the tile out of x (n, ..., scale h, scale W), the content of the tile `wider`."""
        return x[..., (self.top - wider.top) * scale : (self.bottom - wider.top) * scale, :]

    def pixels(self, shape: tuple[int, int, int]) -> range:
        """The pixels of the tile among all pixels of (N, H, W), counted in that order."""
        _, height, width = shape
        return range((self.first * height + self.top) * width, ((self.last - 1) * height + self.bottom) * width)


def split_into_tiles(n: int, height: int, width: int, tile: int | None = None) -> list[Tile]:
    """Cut n images into strips of about tile x tile pixels and equal height, or into a single tile if that is enough.

    Cuts are at even rows, so that pooling by 2 sees the same pairs. A strip has at least about 144 x 144 pixels: for
    very small inputs PyTorch convolves with another library on a CPU, and rounds differently.
    """
    pixels = math.inf if tile is None else max(tile, 144) ** 2
    if n * height * width <= pixels:
        return [Tile(0, n, 0, height)]
    count = max(1, min(height // 2, height * width // pixels))
    tops = [*(height * part // count // 2 * 2 for part in range(count)), height]
    return [Tile(i, i + 1, top, bottom) for i in range(n) for top, bottom in itertools.pairwise(tops)]


def map_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tiles: list[Tile],
    halo: int,
    scale: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute function(x) tile by tile, for a function (N, ., H, W) -> (N, ., scale H, scale W) that sees `halo` rows.

    The result is written to `out` if that is given.
    """
    if len(tiles) == 1 and out is None:
        return function(x)
    for tile in tiles:
        wider = tile.grow(halo, x.shape[2])
        part = tile.crop_from(wider, function(wider.crop(x)), scale)
        if out is None:
            shape = (len(x), part.shape[1], x.shape[2] * scale, x.shape[3] * scale)
            out = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=torch.channels_last)
        tile.crop(out, scale).copy_(part)
    return out
