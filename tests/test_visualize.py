import io

import imageio.v3 as iio
import numpy as np

import visualize


def test_masked_pixels_are_gray_and_darker():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    mask = np.zeros((4, 5), bool)
    mask[1] = True
    drawn = visualize.overlay_mask(image, mask)
    assert np.array_equal(drawn[1], image[1])
    assert (np.ptp(drawn[0], axis=1) == 0).all()
    assert (drawn[0, :, 0] <= image[0].mean(axis=1)).all()


def test_density_map_ranges_from_black_to_yellow():
    masks = np.array([[[False, False, True]], [[False, True, True]]])
    none, half, full = visualize.density_map(masks)[0].astype(int)
    assert none.sum() < 10
    assert full.sum() > half.sum() > none.sum()
    assert full.argmin() == 2  # blue is the weakest channel of yellow


def test_sheets_of_any_size_are_pngs():
    rng = np.random.default_rng(0)
    for height, width, n_colors in ((1, 1, 3), (2, 300, 3), (300, 2, 1)):
        lr = rng.integers(0, 256, (height, width, n_colors), dtype=np.uint8)
        sheet = visualize.mask_sheet("a", lr, lr, rng.integers(0, 2, (5, height, width)).astype(bool))
        assert iio.imread(io.BytesIO(sheet)).ndim == 3
    sheet = visualize.channel_sheet([rng.integers(0, 2, (64, 4)).astype(bool) for _ in range(5)])
    assert iio.imread(io.BytesIO(sheet)).ndim == 3
