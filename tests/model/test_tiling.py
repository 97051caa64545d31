import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.tiling import Tile, map_tiles, split_into_tiles


@given(
    n=st.integers(1, 3),
    height=st.integers(1, 2000),
    width=st.integers(1, 4000),
    tile=st.none() | st.integers(1, 500),
)
def test_tiles_cover_each_row_of_each_image_once(n, height, width, tile):
    tiles = split_into_tiles(n, height, width, tile)
    covered = [(image, row) for tile in tiles for image in range(tile.first, tile.last) for row in _rows(tile)]
    assert sorted(covered) == [(image, row) for image in range(n) for row in range(height)]
    assert all(tile.top % 2 == 0 for tile in tiles)
    if len(tiles) > 1:
        heights = [len(_rows(tile)) for tile in tiles]
        assert max(heights) - min(heights) <= 3
        pixels = max(tile, 144) ** 2
        assert min(heights) >= min(pixels / width - 3, height)
        assert max(heights) <= max(2 * pixels / width, 2) + 3


def _rows(tile):
    return range(tile.top, tile.bottom)


def test_without_a_limit_there_is_one_tile():
    assert split_into_tiles(4, 1000, 1000) == [Tile(0, 4, 0, 1000)]


def test_images_that_fit_in_one_tile_are_not_cut():
    assert split_into_tiles(2, 100, 100, tile=200) == [Tile(0, 2, 0, 100)]
    assert len(split_into_tiles(2, 100, 300, tile=200)) == 2


def test_the_rows_of_a_tile_are_those_of_its_pixels():
    pixels = torch.arange(3 * 10 * 7).view(3, 10, 7)
    for tile in (Tile(1, 2, 3, 6), Tile(2, 3, 0, 10), Tile(0, 3, 0, 10)):
        rows = tile.pixels(pixels.shape)
        assert torch.equal(tile.crop(pixels).flatten(), torch.arange(rows.start, rows.stop))


def test_tiles_grow_up_to_the_border_of_the_image():
    assert Tile(1, 2, 4, 6).grow(3, height=20) == Tile(1, 2, 1, 9)
    assert Tile(1, 2, 2, 6).grow(3, height=8) == Tile(1, 2, 0, 8)
    assert Tile(0, 3, 0, 8).grow(0, height=8) == Tile(0, 3, 0, 8)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_crop_of_a_wider_crop_is_the_crop(scale):
    x = torch.rand(3, 2, 10 * scale, 5 * scale)
    for tile in (Tile(0, 1, 0, 2), Tile(2, 3, 4, 6), Tile(0, 3, 0, 10)):
        for halo in (0, 1, 5):
            wider = tile.grow(halo, height=10)
            expected = x[tile.first : tile.last, :, tile.top * scale : tile.bottom * scale]
            assert torch.equal(tile.crop(x, scale), expected)
            assert torch.equal(tile.crop_from(wider, wider.crop(x, scale), scale), expected)


@pytest.mark.parametrize("size", [(1, 60000), (150, 200), (500, 100)])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("into_given_tensor", [False, True])
def test_a_convolution_tile_by_tile_is_the_convolution(size, scale, into_given_tensor):
    x, weight = torch.randn(2, 3, *size), torch.randn(4, 3, 5, 3)

    def convolve(part):
        return F.interpolate(F.conv2d(part, weight, padding=(2, 1)), scale_factor=scale)

    tiles = split_into_tiles(2, *size, tile=1)
    assert len(tiles) > 1
    expected = convolve(x)
    out = torch.full_like(expected, torch.nan) if into_given_tensor else None
    result = map_tiles(convolve, x, tiles, halo=2, scale=scale, out=out)
    assert out is None or result is out
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_a_single_tile_is_written_to_the_given_tensor():
    x, out = torch.rand(2, 3, 4, 5), torch.full((2, 3, 4, 5), torch.nan)
    assert map_tiles(torch.neg, x, [Tile(0, 2, 0, 4)], halo=1, out=out) is out
    assert torch.equal(out, -x)
