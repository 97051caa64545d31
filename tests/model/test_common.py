import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.common import Strip, by_strips, check_images, strips
from utility import InputError


@given(
    n=st.integers(1, 3),
    height=st.integers(1, 2000),
    width=st.integers(1, 4000),
    tile=st.none() | st.integers(1, 500),
)
def test_strips_cover_each_line_of_each_image_once(n, height, width, tile):
    cuts = strips(n, height, width, tile)
    covered = [
        (image, line) for cut in cuts for image in range(cut.first, cut.last) for line in range(cut.top, cut.bottom)
    ]
    assert sorted(covered) == [(image, line) for image in range(n) for line in range(height)]
    assert all(cut.top % 2 == 0 for cut in cuts)
    if len(cuts) > 1:
        lines = [cut.bottom - cut.top for cut in cuts]
        assert max(lines) - min(lines) <= 3
        wanted = max(tile, 144) ** 2
        assert min(lines) >= min(wanted / width - 3, height)
        assert max(lines) <= max(2 * wanted / width, 2) + 3


def test_one_strip_where_nothing_bounds_it():
    assert strips(4, 1000, 1000) == [Strip(0, 4, 0, 1000)]


def test_the_rows_of_a_strip_are_those_of_its_pixels():
    pixels = torch.arange(3 * 10 * 7).view(3, 10, 7)
    for cut in (Strip(1, 2, 3, 6), Strip(2, 3, 0, 10), Strip(0, 3, 0, 10)):
        rows = cut.rows(pixels.shape)
        assert torch.equal(cut.of(pixels).flatten(), torch.arange(rows.start, rows.stop))


@pytest.mark.parametrize("size", [(1, 60000), (150, 200), (500, 100)])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_convolution_by_strips_is_the_convolution(size, scale):
    x, weight = torch.randn(2, 3, *size), torch.randn(4, 3, 5, 3)

    def convolve(part):
        return F.interpolate(F.conv2d(part, weight, padding=(2, 1)), scale_factor=scale)

    cuts = strips(2, *size, tile=1)
    assert len(cuts) > 1
    torch.testing.assert_close(by_strips(convolve, x, cuts, halo=2, scale=scale), convolve(x), atol=1e-4, rtol=1e-4)


def test_images_are_checked():
    check_images(torch.zeros(2, 3, 4, 5), 3)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.zeros(2, 3, 4, 5)
        x[1, 2, 3, 0] = value
        with pytest.raises(InputError, match=f"image 1 .* {value} at row 3, column 0, channel 2"):
            check_images(x, 3)
    with pytest.raises(InputError, match=r"\(N, 1, H, W\).*\(1, 3, 4, 5\)"):
        check_images(torch.zeros(1, 3, 4, 5), 1)
    with pytest.raises(InputError, match=r"\(3, 4, 5\)"):
        check_images(torch.zeros(3, 4, 5), 3)
