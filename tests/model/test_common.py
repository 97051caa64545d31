import pytest
import torch

from model.common import DIV2K_RGB_MEAN, check_finite, check_images, mean_color, pad_to_multiple
from program import InputError


@pytest.mark.parametrize("rgb_range", [1, 255])
def test_the_mean_color_is_that_of_div2k(rgb_range):
    rgb = torch.tensor([0.4488, 0.4371, 0.4040]) * rgb_range
    torch.testing.assert_close(mean_color(3, rgb_range).flatten(), rgb)
    assert mean_color(3, rgb_range).shape == (1, 3, 1, 1)
    for n_colors in (1, 4):  # not RGB: the average of the three
        expected = torch.full((1, n_colors, 1, 1), sum(DIV2K_RGB_MEAN) / 3 * rgb_range)
        torch.testing.assert_close(mean_color(n_colors, rgb_range), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 6), (5, 5)])
def test_padding_repeats_the_last_row_and_column(size):
    x = torch.rand(2, 3, *size)
    padded = pad_to_multiple(x, 2)
    height, width = (length + length % 2 for length in size)
    rows, columns = (torch.arange(n).clamp(max=length - 1) for n, length in zip((height, width), size, strict=True))
    assert torch.equal(padded, x[..., rows[:, None], columns])


def test_images_are_checked():
    check_images(torch.zeros(2, 3, 4, 5), 3)
    check_finite(torch.zeros(2, 3, 4, 5))
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.zeros(2, 3, 4, 5)
        x[1, 2, 3, 0] = value
        with pytest.raises(InputError, match=f"image 1 .* {value} at row 3, column 0, channel 2"):
            check_finite(x)
    with pytest.raises(InputError, match=r"\(N, 1, H, W\).*\(1, 3, 4, 5\)"):
        check_images(torch.zeros(1, 3, 4, 5), 1)
    with pytest.raises(InputError, match=r"\(3, 4, 5\)"):
        check_images(torch.zeros(3, 4, 5), 3)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 3, 0, 5), (1, 3, 4, 0)])
def test_empty_images_are_refused(shape):
    with pytest.raises(InputError, match=rf"\(N, 3, H, W\).*\({', '.join(map(str, shape))}\)"):
        check_images(torch.zeros(shape), 3)
