"""Pictures of what the masks do, of how results compare, and of how a training goes. Images are uint8 (H, W, 3)."""

import io
import math

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # no pyplot: no window system is touched
from matplotlib.patches import Rectangle


def overlay(image, mask):
    """An image with what a mask (H, W) denies in dark grey."""
    grey = image.mean(axis=2, keepdims=True) * 0.4
    return np.where(mask[..., None], image, grey).astype(np.uint8)


def density_map(masks):
    """The mean of masks, bool (K, H, W), in colors: from black where none works to yellow where all do."""
    colors = colormaps["inferno"](np.mean(masks, axis=0))
    return (colors[..., :3] * 255).round().astype(np.uint8)


def mask_sheet(name, lr, sr, masks):
    """LR, SR and the masks, bool (K, H, W), with their density and their mean: a PNG, as bytes."""
    panels = [(np.broadcast_to(lr, (*lr.shape[:2], 3)), "LR"), (np.broadcast_to(sr, (*sr.shape[:2], 3)), "SR")]
    panels += [(mask, f"module {k + 1}: density {mask.mean():.2f}") for k, mask in enumerate(masks)]
    panels.append((np.mean(masks, axis=0), f"mean: {np.mean(masks):.2f}"))
    columns = 4
    rows = -(-len(panels) // columns)
    height, width = lr.shape[:2]
    panel_height = min(max(3 * height / width, 1), 9)
    figure = Figure(figsize=(3 * columns, rows * (panel_height + 0.3) + 0.4), layout="constrained")
    figure.suptitle(name)
    for index, (image, title) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image, cmap="inferno" if index == len(panels) - 1 else "gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
    return png(figure)


def channel_sheet(channel_masks):
    """The channel masks of K modules, bool (C, L) each, layer by layer: a PNG, as bytes. White channels are dense."""
    figure = Figure(figsize=(9, 1 + 0.25 * sum(mask.shape[1] + 2 for mask in channel_masks)), layout="constrained")
    for k, mask in enumerate(channel_masks):
        n_feats, n_layers = mask.shape
        axes = figure.add_subplot(len(channel_masks), 1, k + 1)
        axes.pcolormesh(mask.T, cmap="gray", vmin=0, vmax=1, edgecolors="0.5", linewidth=0.5)
        axes.invert_yaxis()
        counts = [f"layer {layer + 1}: {mask[:, layer].sum()} of {n_feats} dense" for layer in range(n_layers)]
        axes.set_yticks(np.arange(n_layers) + 0.5, counts, fontsize="small")
        axes.set_xticks([])
        axes.set_title(f"module {k + 1}", fontsize="small", loc="left")
    return png(figure)


def comparison(image, crop, panels):
    """An image with a frame around `crop` (x, y, w, h), and beside it panels [(crop, title)]: a PNG, as bytes."""
    x, y, width, height = crop
    columns = 1 + len(panels)
    ratios = [image.shape[1] / image.shape[0]] + [width / height] * len(panels)
    figure = Figure(figsize=(2.4 * sum(ratios) + 0.2, 3), layout="constrained")
    grid = figure.add_gridspec(1, columns, width_ratios=ratios)
    for index, (picture, title) in enumerate([(image, ""), *panels]):
        axes = figure.add_subplot(grid[index])
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(title, fontsize="small")
        if index == 0:
            frame = {"fill": False, "edgecolor": "red", "linewidth": 2}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, **frame))
    return png(figure, dpi=200)


def png(figure, dpi=120):
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()


# ---- curves of a training --------------------------------------------------------------------------------------------


def _figure(label):
    figure = Figure(figsize=(6, 4), layout="constrained")
    return figure, figure.add_subplot(xlabel="epoch", ylabel=label)


def curves(history, columns, label):
    """Columns of a history (one dict of numbers an epoch) against the epoch: a PNG, as bytes."""
    figure, axes = _figure(label)
    for column in columns:
        points = [(row["epoch"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=column)
    axes.grid(alpha=0.3)
    if len(columns) > 1:
        axes.legend()
    return png(figure)


def mask_curves(history, bins):
    """How the values m of the spatial masks are distributed, stacked: sure ones lie at the bottom and the top."""
    figure, axes = _figure("share of pixels, by m")
    rows = [row for row in history if bins[0] in row]
    shares = [[row[column] for row in rows] for column in bins]
    colors = [str(0.1 + 0.8 * index / (len(bins) - 1)) for index in range(len(bins))]
    axes.stackplot([row["epoch"] for row in rows], shares, labels=bins, colors=colors)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return png(figure)
