import imageio.v3 as iio
import numpy as np
import pytest

from data.resize import crop_to_multiple, downscale, upscale


def cubic(x):
    """The cubic kernel with a = -0.5."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0))


def imresize_axis0(image, scale):
    """MATLAB's imresize along the columns: a stretched cubic kernel, mirrored borders, halves rounded up."""
    height = image.shape[0]
    result = np.empty((height // scale, *image.shape[1:]))
    for row in range(height // scale):
        center = (row + 0.5) * scale - 0.5
        taps = np.arange(np.floor(center - 2 * scale), np.ceil(center + 2 * scale) + 1).astype(int)
        weights = cubic((taps - center) / scale)
        mirrored = np.concatenate([np.arange(height), np.arange(height)[::-1]])[taps % (2 * height)]
        result[row] = np.tensordot(weights / weights.sum(), image[mirrored].astype(float), 1)
    return np.floor(result.clip(0, 255) + 0.5 + 1e-9).astype(np.uint8)


def enlarge_axis0(image, scale):
    """The same for enlarging, where the kernel is not stretched."""
    height = image.shape[0]
    result = np.empty((height * scale, *image.shape[1:]))
    for row in range(height * scale):
        center = (row + 0.5) / scale - 0.5
        taps = np.arange(np.floor(center) - 1, np.floor(center) + 3).astype(int)
        mirrored = np.concatenate([np.arange(height), np.arange(height)[::-1]])[taps % (2 * height)]
        result[row] = np.tensordot(cubic(taps - center), image[mirrored].astype(float), 1)
    return np.floor(result.clip(0, 255) + 0.5 + 1e-9).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 14)])
def test_downscaling_equals_the_formula(scale, size):
    image = np.random.default_rng(0).integers(0, 256, (size[0] * scale, size[1] * scale, 3), dtype=np.uint8)
    expected = imresize_axis0(imresize_axis0(image, scale).transpose(1, 0, 2), scale).transpose(1, 0, 2)
    result = downscale(image, scale)
    assert result.shape == (*size, 3)
    assert (np.abs(result.astype(int) - expected) <= 1).all()
    assert (result != expected).mean() < 0.002  # float32 and float64 may differ at a half


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscaling_equals_the_published_images(shared, scale):
    for hr in (shared / "data/benchmark/Set5/HR").iterdir():
        lr = iio.imread(shared / f"data/benchmark/Set5/LR_bicubic/X{scale}/{hr.name}")
        difference = np.abs(downscale(crop_to_multiple(iio.imread(hr), scale), scale).astype(int) - lr)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_upscaling_equals_the_formula(scale):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    expected = enlarge_axis0(enlarge_axis0(image, scale).transpose(1, 0, 2), scale).transpose(1, 0, 2)
    result = upscale(image, scale)
    assert result.shape == (7 * scale, 9 * scale, 3)
    assert (np.abs(result.astype(int) - expected) <= 1).all()
    assert (result != expected).mean() < 0.002


def test_flat_images_stay_flat():
    assert (downscale(np.full((12, 8, 1), 77, np.uint8), 4) == 77).all()


def test_sides_must_be_multiples_of_the_scale():
    with pytest.raises(ValueError, match="7x8"):
        downscale(np.zeros((7, 8, 3), np.uint8), 2)
    assert crop_to_multiple(np.zeros((7, 8, 3)), 3).shape == (6, 6, 3)
