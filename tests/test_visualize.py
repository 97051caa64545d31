import io
import itertools
import math
import re
import xml.etree.ElementTree

import imageio.v3 as iio
import numpy as np
import pytest

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


def axes_of(figure):
    """The axes of a figure that was rendered, which lays it out."""
    assert iio.imread(io.BytesIO(visualize.to_png(figure))).ndim == 3
    return [axes for part in figure.subfigs for axes in part.axes] or figure.axes


def test_curves_are_drawn_in_panels_and_told_apart_without_color():
    history = [{"epoch": epoch, **{f"density_{k}": k / 10 for k in range(1, 6)}} for epoch in (1, 2, 3)]
    panels = {title: {f"module {k}": f"density_{k}" for k in range(1, 6)} for title in ("training", "Set5")}
    figure = visualize.curves(history, panels, "mask density", limits=(0, 1))
    axes = axes_of(figure)
    assert [panel.get_title("left") for panel in axes] == ["training", "Set5"]
    for panel, part in zip(axes, figure.subfigs, strict=True):
        lines = panel.get_lines()
        assert len({line.get_color() for line in lines}) == 5
        assert len({str(line._dash_pattern) for line in lines}) == 5  # matplotlib has no other way to read it
        assert [line.get_ydata().tolist() for line in lines] == [[k / 10] * 3 for k in range(1, 6)]
        (legend,) = part.legends
        assert [text.get_text() for text in legend.get_texts()] == list(panels["Set5"])
        assert legend.get_window_extent().y1 <= panel.get_tightbbox().y0  # below the curves
        assert part.bbox.x0 <= legend.get_window_extent().x0
        assert legend.get_window_extent().x1 <= part.bbox.x1
        low, high = panel.get_ylim()
        assert low < 0 < 1 < high  # a curve at 0 or 1 is not hidden by the frame


def test_a_module_looks_alike_in_all_panels():
    history = [{"epoch": 1, "a": 1.0}, {"epoch": 2, "a": 2.0}]
    panels = {"shares": {"mean": "a", "module 1": "a", "module 2": "a"}, "densities": {"module 2": "a"}}
    shares, densities = (panel.get_lines() for panel in axes_of(visualize.curves(history, panels, "")))
    assert shares[2].get_color() == densities[0].get_color() != shares[1].get_color()
    assert shares[0].get_linewidth() > shares[1].get_linewidth()  # the mean stands out


def test_curves_skip_missing_and_non_finite_values():
    history = [{"epoch": 1}, {"epoch": 2, "a": math.nan, "b": 2.0}, {"epoch": 3, "a": 1.0}, {"epoch": 4, "a": 3.0}]
    (axes,) = axes_of(visualize.curves(history, {"": {"a": "a", "b": "b", "c": "c"}}, "value"))
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[3, 4], [2], []]
    assert [line.get_marker() for line in axes.get_lines()] == ["", ".", ""]  # one point makes no line


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_histogram_of_mask_values_fills_the_panel(epochs):
    bins = [f"mask_{index / 10}" for index in range(10)]
    shares = np.array([0.4, *[0.025] * 8, 0.4])
    history = [{"epoch": epoch + 1, **dict(zip(bins, shares, strict=True))} for epoch in range(epochs)]
    (axes,) = axes_of(visualize.mask_curves([{"epoch": 0}, *history], bins))
    bands = [(patch.get_data().baseline, patch.get_data().values) for patch in axes.patches]
    assert np.allclose(bands[0][0], 0)
    assert np.allclose([top for _, top in bands], np.array([[0.4], [0.5], [0.6], [1.0]]))
    assert all(np.array_equal(top, bottom) for (_, top), (bottom, _) in itertools.pairwise(bands))
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names == [
        "sparse: 0 to 0.1",
        "rather sparse: 0.1 to 0.5",
        "rather important: 0.5 to 0.9",
        "important: 0.9 to 1",
    ]


def test_svgs_are_repeatable_text_without_fixed_colors():
    history = [{"epoch": 1, "a": 1.0}, {"epoch": 2, "a": 2.0}]
    first, second = (
        visualize.to_svg(visualize.curves(history, {"title & more": {"a": "a"}}, "label")) for _ in range(2)
    )
    assert first == second
    texts = [
        element.text for element in xml.etree.ElementTree.fromstring(first).iter() if element.tag.endswith("}text")
    ]
    assert {"title & more", "label", "epoch"} <= set(texts)
    style = re.search("<style>.*?</style>", first.decode())[0]
    drawn = first.decode().replace(style, "")
    assert not any(color in drawn for color in visualize.ON_DARK)  # only the style sheet has them, per color scheme
    assert set(re.findall(r"var\((--\w+)\)", drawn)) <= set(re.findall(r"(--\w+):", style))


def test_densities_in_words():
    words = [visualize.describe_density(density) for density in (0, 0.001, 0.57, 0.999, 1)]
    assert words == ["empty", "density below 1 %", "density 57 %", "density above 99 %", "full"]


def test_sheets_of_any_size_are_pngs():
    rng = np.random.default_rng(0)
    for height, width, n_colors in ((1, 1, 3), (2, 300, 3), (300, 2, 1)):
        lr = rng.integers(0, 256, (height, width, n_colors), dtype=np.uint8)
        sheet = visualize.mask_sheet("a", lr, lr, rng.integers(0, 2, (5, height, width)).astype(bool))
        assert iio.imread(io.BytesIO(sheet)).ndim == 3
    sheet = visualize.channel_sheet([rng.integers(0, 2, (64, 4)).astype(bool) for _ in range(5)])
    assert iio.imread(io.BytesIO(sheet)).ndim == 3


def test_comparisons_of_any_number_are_pngs():
    image = np.zeros((30, 40, 3), np.uint8)
    for count in range(6):
        strip = visualize.comparison((image, "whole"), (5, 5, 10, 8), [(image[5:13, 5:15], "crop")] * count)
        assert iio.imread(io.BytesIO(strip)).shape[1] == 8 * 120  # as wide as a page, whatever the number
