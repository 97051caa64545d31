"""Images of masks, of results side by side, and of training curves.

Images are uint8 arrays (H, W, 3) unless stated otherwise; figures are returned as the bytes of a PNG file.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing it takes a second, and most calls draw nothing
    from matplotlib.figure import Figure

# ---- masks -----------------------------------------------------------------------------------------------------------


def overlay_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) and a mask, bool (H, W) -> uint8 (H, W, C), dark gray where the mask is false."""
    gray = image.mean(axis=2, keepdims=True) * 0.4
    return np.where(mask[..., None], image, gray).astype(np.uint8)


def density_map(masks: np.ndarray) -> np.ndarray:
    """The mean of masks, bool (K, H, W), in colors: uint8 (H, W, 3).

    Pixels that all masks zero out are black, pixels that all masks keep are yellow.
    """
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.mean(masks, axis=0))
    return (colors[..., :3] * 255).round().astype(np.uint8)


def mask_sheet(name: str, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> bytes:
    """A figure of LR, SR, the masks with their densities, and the mean mask.

    Args:
        name: title
        lr: uint8 (H, W, 1 or 3)
        sr: uint8 (sH, sW, 1 or 3)
        masks: bool (K, H, W), one per SMM
    """
    panels = [(np.broadcast_to(lr, (*lr.shape[:2], 3)), "LR"), (np.broadcast_to(sr, (*sr.shape[:2], 3)), "SR")]
    panels += [(mask, f"SMM {k + 1}: density {mask.mean():.2f}") for k, mask in enumerate(masks)]
    panels.append((np.mean(masks, axis=0), f"mean: {np.mean(masks):.2f}"))
    columns = 4
    rows = -(-len(panels) // columns)
    height, width = lr.shape[:2]
    panel_height = min(max(3 * height / width, 1), 9)
    figure = _new_figure(3 * columns, rows * (panel_height + 0.3) + 0.4)
    figure.suptitle(name)
    for index, (image, title) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image, cmap="inferno" if index == len(panels) - 1 else "gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
    return to_png(figure)


def channel_sheet(channel_masks: Sequence[np.ndarray]) -> bytes:
    """A figure of the channel masks of K SMMs, bool (C, L) each, with one row per layer. White channels are dense."""
    figure = _new_figure(9, 1 + 0.25 * sum(mask.shape[1] + 2 for mask in channel_masks))
    for k, mask in enumerate(channel_masks):
        n_feats, n_layers = mask.shape
        axes = figure.add_subplot(len(channel_masks), 1, k + 1)
        axes.pcolormesh(mask.T, cmap="gray", vmin=0, vmax=1, edgecolors="0.5", linewidth=0.5)
        axes.invert_yaxis()
        counts = [f"layer {layer + 1}: {mask[:, layer].sum()} of {n_feats} dense" for layer in range(n_layers)]
        axes.set_yticks(np.arange(n_layers) + 0.5, counts, fontsize="small")
        axes.set_xticks([])
        axes.set_title(f"SMM {k + 1}", fontsize="small", loc="left")
    return to_png(figure)


# ---- results ---------------------------------------------------------------------------------------------------------


def comparison(image: np.ndarray, crop: tuple[int, int, int, int], panels: Sequence[tuple[np.ndarray, str]]) -> bytes:
    """A figure of an image with a frame around `crop`, followed by crops of the same size.

    Args:
        image: uint8 (H, W, 3)
        crop: x, y, width and height in pixels of the image
        panels: (uint8 array (height, width, 3), title) of each crop
    """
    from matplotlib.patches import Rectangle

    x, y, width, height = crop
    columns = 1 + len(panels)
    ratios = [image.shape[1] / image.shape[0]] + [width / height] * len(panels)
    figure = _new_figure(2.4 * sum(ratios) + 0.2, 3)
    grid = figure.add_gridspec(1, columns, width_ratios=ratios)
    for index, (panel, title) in enumerate([(image, ""), *panels]):
        axes = figure.add_subplot(grid[index])
        axes.imshow(panel, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(title, fontsize="small")
        if index == 0:
            frame = {"fill": False, "edgecolor": "red", "linewidth": 2}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, **frame))
    return to_png(figure, dpi=200)


# ---- training curves -------------------------------------------------------------------------------------------------


# Okabe and Ito's colors, which the color-blind tell apart. The line styles repeat with another period.
COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))


def curves(
    history: Sequence[Mapping[str, float]],
    panels: Mapping[str, Mapping[str, str]],
    label: str,
    limits: tuple[float, float] | None = None,
) -> bytes:
    """A figure of columns of a history against the epoch. Missing and non-finite values are skipped.

    Args:
        history: one {column: value} per epoch, with the column "epoch"
        panels: {title: {name of a curve: its column}}, drawn one below the other
        label: label of the y axes
        limits: lower and upper end of the y axes, with a margin; None: as the values ask for
    """
    figure = _new_figure(7, 1.2 + 2.4 * len(panels))
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        for index, (name, column) in enumerate(columns.items()):
            points = [(row["epoch"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=COLORS[index % len(COLORS)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                marker="." if len(points) == 1 else "",  # a single point makes no line
                label=name,
            )
        axes.set(title=title, ylabel=label)
        if limits:
            margin = 0.03 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        axes.grid(alpha=0.3)
        if len(columns) > 1:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    grid[-1].set_xlabel("epoch")
    return to_png(figure)


def mask_curves(history: Sequence[Mapping[str, float]], bins: Sequence[str]) -> bytes:
    """A stacked histogram of the values m of the spatial masks against the epoch.

    Binary masks fill the lowest and the highest bin only.

    Args:
        history: one {column: value} per epoch; rows without the bins are skipped
        bins: columns of the history, from the lowest values of m to the highest; each holds a share of the pixels
    """
    figure = _new_figure(7, 3.6)
    axes = figure.add_subplot(xlabel="epoch", ylabel="share of pixels")
    rows = [row for row in history if bins[0] in row]
    shares = [[row[column] for row in rows] for column in bins]
    colors = [str(0.1 + 0.8 * index / (len(bins) - 1)) for index in range(len(bins))]
    edges = [index / len(bins) for index in range(len(bins) + 1)]
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    axes.stackplot([row["epoch"] for row in rows], shares, labels=labels, colors=colors)
    axes.legend(title="mask value", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return to_png(figure)


def _new_figure(width, height):
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure  # pyplot would look for a window system

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: "Figure", dpi: int = 120) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()
