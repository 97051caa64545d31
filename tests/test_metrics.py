import math

import numpy as np
import pytest
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio

from metrics import luma, psnr, shave, ssim


@pytest.fixture
def images():
    """A random RGB image and a noisy copy of it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return image, np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def test_luma_and_psnr_agree_with_scikit_image(images):
    for image in images:
        assert np.abs(luma(image) - rgb2ycbcr(image)[..., 0]).max() < 1e-2
    assert psnr(*images) == pytest.approx(peak_signal_noise_ratio(*images, data_range=255))


def test_identical_images_and_images_too_small_to_measure():
    image = np.full((12, 12), 7.0)
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == pytest.approx(1)
    assert not math.isnan(ssim(image[:11], image[:11]))
    assert math.isnan(ssim(image[:10], image[:10]))
    assert math.isnan(psnr(shave(image, 6), shave(image, 6)))


def ssim_by_formula(a, b):
    """Wang et al. 2004: 11x11 Gaussian window, sigma 1.5, only where the window lies inside the image."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def local(values):
        return np.einsum("hwij,ij", np.lib.stride_tricks.sliding_window_view(values, (11, 11)), window)

    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean(
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    )


def test_ssim_equals_the_formula(images):
    a, b = (luma(image) for image in images)
    assert ssim(a, b) == pytest.approx(ssim_by_formula(a, b), abs=1e-9)


def test_shave_cuts_all_four_sides():
    assert np.array_equal(shave(np.arange(30).reshape(5, 6), 2), [[14, 15]])
    assert shave(np.zeros((4, 4)), 0).shape == (4, 4)
    assert shave(np.zeros((7, 6, 3)), 2).shape == (3, 2, 3)


def test_gray_and_rgb_images_have_the_same_luma():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_allclose(luma(gray), luma(gray.repeat(3, 2)))
