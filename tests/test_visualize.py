import io
import math

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


def draw_curves(monkeypatch, *args, **options):
    """The axes of the figure that `visualize.curves` renders."""
    figures, render = [], visualize.to_png
    monkeypatch.setattr(visualize, "to_png", lambda figure: figures.append(figure) or render(figure))
    assert iio.imread(io.BytesIO(visualize.curves(*args, **options))).ndim == 3
    return figures[0].axes


def test_curves_are_drawn_in_panels_and_told_apart_without_color(monkeypatch):
    history = [{"epoch": epoch, **{f"density_{k}": k / 10 for k in range(1, 6)}} for epoch in (1, 2, 3)]
    panels = {title: {f"module {k}": f"density_{k}" for k in range(1, 6)} for title in ("training", "Set5")}
    axes = draw_curves(monkeypatch, history, panels, "mask density", limits=(0, 1))
    assert [panel.get_title() for panel in axes] == ["training", "Set5"]
    for panel in axes:
        lines = panel.get_lines()
        assert len({line.get_color() for line in lines}) == 5
        assert len({str(line._dash_pattern) for line in lines}) == 5  # matplotlib has no other way to read it
        assert [line.get_ydata().tolist() for line in lines] == [[k / 10] * 3 for k in range(1, 6)]
        legend = panel.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == list(panels["Set5"])
        assert legend.get_window_extent().x0 >= panel.get_window_extent().x1  # beside the curves
        low, high = panel.get_ylim()
        assert low < 0 < 1 < high  # a curve at 0 or 1 is not hidden by the frame


def test_curves_skip_missing_and_non_finite_values(monkeypatch):
    history = [{"epoch": 1}, {"epoch": 2, "a": math.nan, "b": 2.0}, {"epoch": 3, "a": 1.0}, {"epoch": 4, "a": 3.0}]
    (axes,) = draw_curves(monkeypatch, history, {"": {"a": "a", "b": "b", "c": "c"}}, "value")
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[3, 4], [2], []]
    assert [line.get_marker() for line in axes.get_lines()] == ["", ".", ""]  # one point makes no line


def test_sheets_of_any_size_are_pngs():
    rng = np.random.default_rng(0)
    for height, width, n_colors in ((1, 1, 3), (2, 300, 3), (300, 2, 1)):
        lr = rng.integers(0, 256, (height, width, n_colors), dtype=np.uint8)
        sheet = visualize.mask_sheet("a", lr, lr, rng.integers(0, 2, (5, height, width)).astype(bool))
        assert iio.imread(io.BytesIO(sheet)).ndim == 3
    sheet = visualize.channel_sheet([rng.integers(0, 2, (64, 4)).astype(bool) for _ in range(5)])
    assert iio.imread(io.BytesIO(sheet)).ndim == 3
