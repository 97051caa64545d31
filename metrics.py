"""PSNR and SSIM of 8-bit images, as super-resolution papers measure them."""

import math

import numpy as np
from skimage.metrics import structural_similarity


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), RGB, or (H, W, 1), gray -> Y of BT.601 YCbCr in 16...235, float64 (H, W)."""
    weights = np.array([65.738, 129.057, 25.064]) / 256
    return 16 + (image @ weights if image.shape[2] == 3 else image[..., 0] * weights.sum())


def shave(image: np.ndarray, border: int) -> np.ndarray:
    """Cut `border` pixels from each side of an image (H, W) or (H, W, C)."""
    height, width = image.shape[:2]
    return image[border : height - border, border : width - border]


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, peak 255; inf if the images are identical, nan if they are empty."""
    difference = image.astype(np.float64) - reference
    if not difference.size:
        return math.nan
    mse = np.mean(difference**2)
    return math.inf if mse == 0 else float(10 * np.log10(255**2 / mse))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two images (H, W) in 0...255 (Wang et al. 2004); nan if a side is below 11 pixels."""
    if min(image.shape) < 11:
        return math.nan
    return float(
        structural_similarity(
            image, reference, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )
