"""Images of masks, of results side by side, and of training curves.

Images are uint8 arrays (H, W, 3) unless stated otherwise. Sheets and comparisons are returned as the bytes of a PNG
file, training curves as figures, which `to_png` and `to_svg` render.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure  # pyplot would look for a window system
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colors, which the color-blind tell apart. The line styles repeat with another period.
COLORS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
ON_DARK = {"#000000": "#eeeeee", "#0072b2": "#4aa3e0", "#009e73": "#2cc295", "#d55e00": "#ff8b45"}  # what SVGs replace
BANDS = ("#e69f00", "#f6dca0", "#a5cfe6", "#0072b2")  # of mask values, from 0 to 1
PALE = "#dddddd"

# ---- masks -----------------------------------------------------------------------------------------------------------


def overlay_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) and a mask, bool (H, W) -> uint8 (H, W, C), dark gray where the mask is false."""
    gray = image.mean(axis=2, keepdims=True) * 0.4
    return np.where(mask[..., None], image, gray).astype(np.uint8)


def density_map(masks: np.ndarray) -> np.ndarray:
    """The mean of masks, bool (K, H, W), in colors: uint8 (H, W, 3).

    Pixels that all masks zero out are black, pixels that all masks keep are yellow.
    """
    colors = colormaps["inferno"](np.mean(masks, axis=0))
    return (colors[..., :3] * 255).round().astype(np.uint8)


def describe_density(density: float) -> str:
    """The density of a mask, 0...1, in words: "density 57 %", "empty" or "full"."""
    if density in (0, 1):
        return "full" if density else "empty"
    percent = round(100 * density)
    return {0: "density below 1 %", 100: "density above 99 %"}.get(percent, f"density {percent} %")


def mask_sheet(name: str, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> bytes:
    """A figure of LR, SR, the masks with their densities, and the mean mask with a color bar.

    Args:
        name: title
        lr: uint8 (H, W, 1 or 3)
        sr: uint8 (sH, sW, 1 or 3)
        masks: bool (K, H, W), one per SMM
    """
    panels = [
        (np.broadcast_to(image, (*image.shape[:2], 3)), "{}, {}x{}".format(title, *image.shape[1::-1]))
        for image, title in ((lr, "LR"), (sr, "SR"))
    ]
    panels += [(mask, f"mask {k + 1}: {describe_density(mask.mean())}") for k, mask in enumerate(masks)]
    panels.append((np.mean(masks, axis=0), f"all masks: mean {describe_density(np.mean(masks))}"))
    columns = 4
    rows = -(-len(panels) // columns)
    height, width = lr.shape[:2]
    panel_height = min(max(3 * height / width, 1), 9)
    figure = Figure(figsize=(3 * columns, rows * (panel_height + 0.35) + 1), layout="constrained")
    figure.suptitle(name)
    for index, (image, title) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        drawn = axes.imshow(image, cmap="inferno" if index == len(panels) - 1 else "gray", vmin=0, vmax=1)
        axes.set_title(title)
        axes.set_axis_off()
    _count_bar(axes, drawn, len(masks))
    if any(not mask.any() for mask in masks):
        figure.supxlabel(
            "empty: no pixel is important, so the module computes only its dense channels", fontsize="medium"
        )
    return to_png(figure, dpi=100)


def _count_bar(axes, drawn, n_masks):
    """A color bar below the mean of the masks, which counts them."""
    bar = axes.inset_axes((0, -0.09, 1, 0.05))
    ticks = np.arange(n_masks + 1) / n_masks
    bar.figure.colorbar(
        drawn, cax=bar, orientation="horizontal", ticks=ticks, label="modules that find a pixel important"
    )
    bar.set_xticks(ticks, np.arange(n_masks + 1))


def channel_sheet(channel_masks: Sequence[np.ndarray]) -> bytes:
    """A figure of the channel masks of K SMMs, bool (C, L) each, with one row per layer. Dense channels are blue."""
    n_feats = len(channel_masks[0])
    heights = [mask.shape[1] for mask in channel_masks]
    figure = Figure(figsize=(9, 1.1 + 0.19 * sum(heights) + 0.12 * len(heights)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04)
    grid = figure.subplots(len(channel_masks), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for k, (axes, mask) in enumerate(zip(grid, channel_masks, strict=True)):
        axes.pcolormesh(
            mask.T, cmap=ListedColormap((PALE, COLORS[1])), vmin=0, vmax=1, edgecolors="white", linewidth=0.8
        )
        axes.invert_yaxis()
        labels = [f"layer {layer + 1}: {count} dense" for layer, count in enumerate(mask.sum(0))]
        axes.set_yticks(np.arange(mask.shape[1]) + 0.5, labels, fontsize="small")
        axes.set_ylabel(f"module {k + 1}", rotation="horizontal", ha="right", va="center")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    channels = [1, *range(8, n_feats + 1, 8)]
    axes.set_xticks(np.array(channels) - 0.5, channels, fontsize="small")
    axes.set_xlabel("channel")
    kinds = {"dense: computed at every pixel": COLORS[1], "sparse: computed at important pixels": PALE}
    handles = [Patch(color=color, label=label) for label, color in kinds.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return to_png(figure)


# ---- results ---------------------------------------------------------------------------------------------------------


Panel = tuple[np.ndarray, str]  # an image, uint8 (H, W, 3), and its title


def comparison(image: Panel, crop: tuple[int, int, int, int], panels: Sequence[Panel]) -> bytes:
    """A figure of an image with a frame around `crop`, and of crops of the same size, enlarged smoothly.

    Args:
        image: the whole image
        crop: x, y, width and height in pixels of the image
        panels: the crops
    """
    x, y, width, height = crop
    count = 1 + len(panels)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    side = 8 / columns  # inches
    figure = Figure(figsize=(8, rows * (side * height / width + 0.5)), layout="constrained")
    for index, (panel, title) in enumerate([image, *panels]):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(panel, interpolation="bicubic")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(title, fontsize="large")
        if index == 0:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="red", linewidth=2))
    return to_png(figure, dpi=120)


# ---- training curves -------------------------------------------------------------------------------------------------


PANEL = (4.6, 2.7)  # inches


def curves(
    history: Sequence[Mapping[str, float]],
    panels: Mapping[str, Mapping[str, str]],
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A figure of columns of a history against the epoch. Missing and non-finite values are skipped.

    Args:
        history: one {column: value} per epoch, with the column "epoch"
        panels: {title: {name of a curve: its column}}, drawn one below the other
        label: label of the y axes
        limits: lower and upper end of the y axes, with a margin; None: as the values ask for
    """
    figure = Figure(figsize=(PANEL[0], PANEL[1] * len(panels)), layout="constrained")
    parts = figure.subfigures(len(panels), squeeze=False)[:, 0]
    for part, (title, columns) in zip(parts, panels.items(), strict=True):
        axes = _panel(part, title, label)
        for position, (name, column) in enumerate(columns.items()):
            points = [(row["epoch"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
            module = re.fullmatch(r"module (\d+)", name)
            index = int(module[1]) if module else position  # a module looks alike in all panels
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=COLORS[index % len(COLORS)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                linewidth=2.2 if index == 0 else 1.5,
                marker="." if len(points) == 1 else "",  # a single point makes no line
                label=name,
            )
        if limits:
            margin = 0.03 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        if len(columns) > 1:
            _legend_below(part)
    return figure


def mask_curves(history: Sequence[Mapping[str, float]], bins: Sequence[str]) -> Figure:
    """A stacked histogram of the values of the spatial masks against the epoch.

    Binary masks fill the lowest and the highest bin only. The bins between them are drawn as two.

    Args:
        history: one {column: value} per epoch; rows without the bins are skipped
        bins: columns of the history, from the lowest values to the highest; each holds a share of the pixels
    """
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = _panel(figure, "mask values, training", "share of pixels")
    rows = [row for row in history if bins[0] in row]
    epochs = np.array([row["epoch"] for row in rows])
    edges = np.concatenate([epochs - 0.5, epochs[-1:] + 0.5])
    bounds = (0, 1, len(bins) // 2, len(bins) - 1, len(bins))
    names = ("sparse", "rather sparse", "rather important", "important")
    below = np.zeros(len(rows))
    for (low, high), name, color in zip(itertools.pairwise(bounds), names, BANDS, strict=True):
        top = below + [sum(row[column] for column in bins[low:high]) for row in rows]
        label = f"{name}: {low / len(bins):g} to {high / len(bins):g}"
        axes.stairs(top, edges, baseline=below, fill=True, color=color, label=label)
        below = top
    axes.margins(0)
    axes.set_axisbelow(True)
    _legend_below(figure)
    return figure


def compare_runs(runs: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], label: str) -> Figure:
    """A figure of the quality of several runs: against time on the left, against the active share on the right.

    Args:
        runs: {name: (hours, active shares in 0...1, quality), one of each per epoch}
        label: of the quality, on the y axes
    """
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.22 * len(runs)), layout="constrained")
    time, share = figure.subplots(1, 2, sharey=True)
    _style_axes(time, "quality over time", "hours", label)
    _style_axes(share, "quality and work", "active share", "")
    for position, (name, (hours, shares, quality)) in enumerate(runs.items()):
        name = name.replace("$", r"\$").lstrip("_")  # to Matplotlib, mathematics and an entry to hide
        style = {"color": COLORS[position % len(COLORS)], "linestyle": LINE_STYLES[position % len(LINE_STYLES)]}
        for axes, values in ((time, hours), (share, shares)):
            axes.plot(values, quality, marker="o", markevery=[-1], label=name, **style)
    _legend_below(figure)
    return figure


def _panel(part: Figure | SubFigure, title: str, label: str):
    """The axes of one panel, over the epochs."""
    axes = part.add_subplot()
    _style_axes(axes, title, "epoch", label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel(x_label, fontsize="small")
    axes.set_ylabel(y_label, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _legend_below(part: Figure | SubFigure) -> None:
    """A legend with as many columns as its longest name leaves room for."""
    handles, labels = part.axes[0].get_legend_handles_labels()
    columns = max(1, int(PANEL[0] * 72 // (40 + 4.6 * max(map(len, labels)))))  # 72 points per inch
    style = {"fontsize": "small", "frameon": False, "handlelength": 2.8, "columnspacing": 1.2}
    part.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


# ---- files -----------------------------------------------------------------------------------------------------------


FIGURE_MARK = b"Matplotlib"  # in every figure that it writes


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()


def to_svg(figure: Figure) -> bytes:
    """Render a figure as the bytes of an SVG file without background, which follows its viewer's dark mode."""
    image = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "smsr"}):  # text stays text, names do not change
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue()
    for color in ON_DARK:
        text = text.replace(color, f"var(--c{color[1:]})")
    light = "".join(f"--c{color[1:]}: {color}; " for color in ON_DARK)
    dark = "".join(f"--c{color[1:]}: {on_dark}; " for color, on_dark in ON_DARK.items())
    style = (
        f"svg {{ {light}fill: var(--c000000) }} text {{ font-family: system-ui, sans-serif !important }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}"
    )
    start = text.index(">", text.index("<svg")) + 1
    return f"{text[:start]}<style>{style}</style>{text[start:]}".encode()
