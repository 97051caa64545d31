"""What a training reports: running means, log.csv and its curves, TensorBoard."""

import csv
import importlib.util
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import distributed
import visualize
from files import write_whole
from program import InputError
from utility import logger

Row = dict[str, float]  # the numbers of one epoch, by column of log.csv
Panels = dict[str, dict[str, str]]  # {title of a panel: {name of a curve: its column}}

# Of each figure the label of its axes, their limits and its curves: which columns, in which panel, under which name.
CURVES = {
    "loss": ("loss", None, [(r"loss", "loss", "total, with λ · active share"), (r"loss_(.+)", "loss", r"\1")]),
    "psnr": (
        "PSNR (dB)",
        None,
        [
            (r"psnr_rgb_(.+?)(_ema)?", r"PSNR, \1, RGB", r"weights\2"),
            (r"psnr_y_(.+?)(_ema)?", r"PSNR, \1, Y", r"weights\2"),
        ],
    ),
    "active_share": (
        "active share",
        (0, 1),
        [
            (r"active", "active share, training, soft masks", "mean"),
            (r"active_(\d+)", "active share, training, soft masks", r"module \1"),
            (r"active_share_(.+)", "active share, validation, hard masks", r"\1"),
        ],
    ),
    "density": (
        "mask density",
        (0, 1),
        [
            (r"density_(\d+)", "mask density, training, soft masks", r"module \1"),
            (r"density_(\d+)_(.+)(?<!_ema)", r"mask density, \2, hard masks", r"module \1"),
        ],
    ),
}

EMPTY, FULL = 0.01, 0.99  # a mask whose density lies below or above does not select pixels
PATIENCE = 2  # epochs; in a single one a mask may be empty or full by chance
ADVICE = {
    "empty": "start another run from the weights of this one with revive_masks, because empty masks rarely recover",
    "full": "raise lambda_sparsity, because they save nothing",
}


def comparable(history: Sequence[Row]) -> list[Row]:
    """The epochs that rival the last one: with a smaller lambda, or without masks, PSNR is higher but less is saved."""

    def pressure(row: Row) -> tuple[float, bool] | None:
        has_masks = any(column.startswith(("density_1", "mask_")) for column in row)  # version 0.1.0 had only mask_...
        trained_without = row.get("active") == 1
        return (row["lambda"], trained_without) if has_masks and math.isfinite(row.get("lambda", math.nan)) else None

    return [row for row in history if pressure(row) == pressure(history[-1])]


class RunningMeans:
    """Means over the good steps of an epoch. Sums stay on the device, so that adding to them does not wait for it.

    A step is skipped, and only counted, if its loss or gradient is not finite or its loss is too large.
    """

    def __init__(self, device: torch.device):
        self.skipped = torch.zeros(2, device=device)  # skipped steps: in this epoch, and in a row
        self.start_epoch()

    def start_epoch(self) -> None:
        self.names: Sequence[str] = ()
        self.sums: torch.Tensor | None = None  # over the good steps; the last entry is their number
        self.skipped[0] = 0
        self._reported = 0

    def add(self, names: Sequence[str], values: torch.Tensor, is_good: torch.Tensor) -> None:
        """Add the values (K,) of a step under their names, if it `is_good`, a bool tensor ()."""
        if self.sums is not None and list(names) != list(self.names):
            self._rename(names)
        self.names = names
        values = torch.where(is_good, torch.cat([values, values.new_ones(1)]), 0)
        self.sums = values if self.sums is None else self.sums + values
        is_skipped = (~is_good).float()
        self.skipped = torch.stack([self.skipped[0] + is_skipped, (self.skipped[1] + 1) * is_skipped])

    def _rename(self, names):
        """Continue an epoch whose first steps had other values, in another version or with another loss."""
        *sums, count = self.sums
        known = dict(zip(self.names, sums, strict=True))
        unknown = torch.full_like(count, math.nan)
        self.sums = torch.stack([*(known.get(name, unknown) for name in names), count])

    def means(self) -> Row:
        """The means so far, with "loss" and "active" always among them; nan before the first good step."""
        *values, count = self.sums.tolist() if self.sums is not None else [0]
        means = {name: value / count if count else math.nan for name, value in zip(self.names, values, strict=True)}
        active = [value for name, value in means.items() if name.startswith("active_")]
        return {"loss": math.nan, **means, "active": sum(active) / len(active) if active else math.nan}

    def skipped_steps(self) -> tuple[int, int]:
        """(steps skipped since the last call in this epoch, steps skipped in a row up to now). Waits for the device."""
        in_epoch, in_a_row = (int(number) for number in self.skipped.tolist())
        since_last_call, self._reported = in_epoch - self._reported, in_epoch
        return since_last_call, in_a_row

    def average_over_processes(self) -> None:
        if self.sums is not None:
            distributed.average([self.sums])

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "sums": self.sums, "bad": self.skipped}  # the keys of version 0.1.0

    def load_state(self, state: dict[str, Any]) -> None:
        self.names, self.skipped = state["names"], state["bad"].to(self.skipped.device)
        self.sums = None if state["sums"] is None else state["sums"].to(self.skipped.device)
        self._reported = int(self.skipped[0])


def _empty_and_full(densities):
    """Which of K masks are empty, and which full, on each of N images: bool (K,) each. densities: (N, K)"""
    return (densities < EMPTY).all(0), (densities > FULL).all(0)


def find_collapsed(densities: np.ndarray) -> np.ndarray:
    """Which of K masks do not select pixels on any of N images, bool (K,). densities: (N, K) in 0...1"""
    empty, full = _empty_and_full(densities)
    return empty | full


class MaskMonitor:
    """Warns of modules whose mask stays empty, or full, on every validation image, once unless they recover.

    epochs: {"empty" or "full": {module: for how many successive epochs}}
    """

    def __init__(self):
        self.epochs: dict[str, dict[str, int]] = {}

    def check(self, epoch: int, densities: np.ndarray, may_be_full: bool = False) -> None:
        """Log a warning if modules have collapsed.

        Args:
            epoch: after which the densities were measured
            densities: of K masks on N images, (N, K) in 0...1
            may_be_full: while the sparsity loss does not have its full weight
        """
        empty, full = _empty_and_full(densities)
        collapsed = {"empty": empty, "full": full & (not may_be_full)}
        for state, is_collapsed in collapsed.items():
            before = self.epochs.get(state, {})
            self.epochs[state] = {k: before.get(k, 0) + 1 for k in map(str, np.flatnonzero(is_collapsed) + 1)}
            modules = [k for k, count in self.epochs[state].items() if count == PATIENCE]
            if modules:
                logger.warning(
                    f"epoch {epoch}: the masks of these modules have been {state} on every validation image for "
                    f"{PATIENCE} epochs: {', '.join(modules)}; {ADVICE[state]} (docs/training.md)"
                )


def mask_histogram(masks: Sequence[torch.Tensor]) -> Row:
    """K masks m (N, 1, H, W) in 0...1 -> {"mask_0.3": the share of pixels with m from 0.3 to 0.4, ...}."""
    m = torch.cat([mask.flatten().float() for mask in masks]).cpu()  # histc has no deterministic algorithm on a GPU
    counts = torch.histc(m, bins=10, min=0, max=1) / m.numel()
    return {f"mask_{index / 10}": value for index, value in enumerate(counts.tolist())}


def write_history(folder: Path, history: Sequence[Row]) -> None:
    """Write log.csv, one row per epoch, to the folder of a run."""
    columns = _columns(history)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
    write_whole(folder / "log.csv", text.getvalue().encode())


def read_history(folder: Path) -> list[Row]:
    """Read log.csv of a run. Raises InputError if it is missing, or was not written by a training."""
    path = folder / "log.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        history = [{key: float(value) for key, value in row.items() if value != ""} for row in rows]
        is_complete = bool(history) and all(math.isfinite(row["epoch"]) for row in history)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; resume the training") from None
    except (ValueError, TypeError, KeyError, csv.Error):
        is_complete = False
    if not is_complete:
        raise InputError(f"{path}: is not the log of a training, or damaged; resume the training")
    return history


def write_curves(folder: Path, history: Sequence[Row]) -> None:
    """Write the curves of a history to a folder, as <name>.png."""
    for name, (label, limits, panels) in find_curves(history).items():
        write_whole(folder / f"{name}.png", visualize.to_png(visualize.curves(history, panels, label, limits)))
    if bins := _mask_bins(history):
        write_whole(folder / "masks.png", visualize.to_png(visualize.mask_curves(history, bins)))


def draw_panels(history: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """(title, figure) of all curves of a history, with one figure per panel."""
    for label, limits, panels in find_curves(history).values():
        for title, columns in panels.items():
            yield title, visualize.curves(history, {title: columns}, label, limits)
    if bins := _mask_bins(history):
        yield "mask values", visualize.mask_curves(history, bins)


def find_curves(history: Sequence[Row]) -> dict[str, tuple[str, tuple[float, float] | None, Panels]]:
    """{name: (label of the axes, their limits, panels)} of the entries of CURVES that a history has columns for."""
    found = {name: (*axes, _find_panels(_columns(history), curves)) for name, (*axes, curves) in CURVES.items()}
    return {name: curves for name, curves in found.items() if curves[-1]}


def _columns(history):
    return list(dict.fromkeys(key for row in history for key in row))


def _mask_bins(history):
    return [key for key in _columns(history) if key.startswith("mask_")]


def _find_panels(columns: Iterable[str], curves: Iterable[tuple[str, str, str]]) -> Panels:
    """The panels of the columns that match the (pattern, panel, name) of `curves`."""
    panels = {}
    for pattern, *templates in curves:
        for match in filter(None, (re.fullmatch(pattern, column) for column in columns)):
            panel, name = (match.expand(template).replace("_ema", ", averaged") for template in templates)
            panels.setdefault(panel, {})[name] = match[0]
    return panels


def check_tensorboard() -> None:
    """Raise InputError if the optional tensorboard package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("the package is not installed; pip install tensorboard", argument="tensorboard")


class TensorBoard:
    """Writes <folder>/tensorboard: the numbers of log.csv, and images.

    Args:
        folder: of the run
        images_every: epochs between two sets of images
    """

    def __init__(self, folder: Path, images_every: int = 10):
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self.writer = SummaryWriter(folder / "tensorboard")
        self.images_every = images_every

    def write(self, row: Row, model: torch.nn.Module, images: Sequence) -> None:
        """Write the numbers of an epoch and, every few epochs, the first of the `images` (WholeImages) with masks."""
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        if (epoch - 1) % self.images_every == 0:
            self._write_images(epoch, model, images)
        self.writer.flush()

    @torch.no_grad()
    def _write_images(self, epoch, model, images):
        name, lr, hr = images[0]
        model.eval()
        sr, cost = model.inference(model.to_input(lr[None]))
        for title, image in (("LR", lr), ("SR", model.to_images(sr)[0]), ("HR", hr)):
            self.writer.add_image(f"{name}/{title}", image, epoch, dataformats="HWC")
        for k, mask in enumerate(cost.masks):
            self.writer.add_image(f"{name}/mask {k + 1}", mask[0].float(), epoch)
