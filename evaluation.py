"""Run a network over a set of images and measure quality, time and cost."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import distributed
from data.srdata import WholeImages
from metrics import luma, psnr, shave, ssim
from model.network import Cost, Network, Predict, to_numpy
from perceptual import Measure
from program import InputError, is_out_of_memory
from utility import logger, progress_bar, synchronize

MAX_WAITING = 32  # images whose quality is computed, or waits for it

Metrics = dict[str, Any]  # the content of metrics.json


class Results(Protocol):
    """What a test keeps of each image; see results.py."""

    failed: dict[str, str]  # {image name: why it could not be done}
    n_reused: int  # images that an earlier test had done

    def find(self, name: str) -> tuple[dict[str, Any], Cost] | None:
        """The row and the cost of an image that an earlier test has done."""

    def save(self, row: dict[str, Any], cost: Cost, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> None:
        """Keep an image: its row, its cost, LR and SR, uint8 or uint16 (H, W, C), masks, bool (K, H, W)."""


def evaluate(
    model: Network,
    images: WholeImages,
    predict: Predict | None = None,
    results: Results | None = None,
    warm_up: bool = True,
    measures: Mapping[str, Measure] | None = None,
) -> Metrics:
    """Run a network over a set and return the content of metrics.json; PSNR and SSIM are nan without HR images.

    Benchmark sets are measured on Y with `scale` border pixels shaved, other sets on RGB too, with `scale + 6` shaved.
    Several processes share the images; all of them return the numbers of all images.

    Args:
        predict: runs the network, see model/inference.py; None: model.inference
        results: knows which images are done and keeps the others. Images that cannot be read or do not fit in memory
            are left out and named in `results.failed`; without results, they raise an InputError
        warm_up: run the first image once before measuring times
        measures: more metrics, of RGB images with `scale` border pixels shaved; see perceptual.build_measures
    """
    model.eval()
    predict = predict or model.inference
    measured, failed = {}, {}  # of this process: by index, what `_Evaluation.measure` returns, and messages
    mine = range(distributed.rank(), len(images), distributed.world_size())
    progress = progress_bar(mine, distributed.is_main_process(), desc=images.name, unit="image")
    with progress, _background(model.device) as submit:
        run = _Evaluation(
            model, images, predict=predict, results=results, submit=submit, warm_up=warm_up, measures=measures or {}
        )
        for index in progress:
            try:
                measured[index] = run.measure(index)
            except InputError as error:
                if results is None:
                    raise
                failed[index] = error.for_command_line()
    measured = {index: (row | quality.result(), cost) for index, (row, quality, cost) in measured.items()}
    measured = _in_order(measured)
    if results is not None:
        results.n_reused = sum(distributed.gather(run.n_reused))
        results.failed = {images.names[index]: message for index, message in _in_order(failed).items()}
    rows, costs = [row for row, _ in measured.values()], [cost for _, cost in measured.values()]
    _report_left_out(rows, images.name)
    facts = {"dataset": images.name, "scale": images.scale, "model": type(model).__name__}
    return facts | {"parameters": model.n_parameters} | _summarize(rows, costs, images.scale)


def _in_order(values):
    """{index: value} of all processes, in the order of the indices."""
    return dict(sorted((index, value) for share in distributed.gather(values) for index, value in share.items()))


@dataclass
class _Evaluation:
    """Measures one image after another; see `evaluate` for its settings."""

    model: Network
    images: WholeImages
    predict: Predict
    results: Results | None
    submit: Callable[..., Future]
    warm_up: bool  # run the next image twice
    measures: Mapping[str, Measure]
    n_reused: int = 0

    def measure(self, index: int) -> tuple[dict[str, Any], Future, Cost]:
        """The row of an image, its PSNR and SSIM, and its cost; an image that is done is not done again."""
        if self.results and (done := self.results.find(self.images.names[index])):
            row, cost = done
            self.n_reused += 1
            return row, _compute_at_once(dict), cost
        name, lr, hr = self.images[index]
        with _report_lack_of_memory(name, lr):
            sr, cost, seconds = self._upscale(lr)
            row = {"name": name, "lr_shape": list(lr.shape[:2]), "seconds": seconds}
            row |= {"mask_density": cost.mask_density, "active_share": cost.active_share}
            if self.measures:
                row["perceptual"] = _measure(self.measures, sr, hr, self.images.scale)
            quality = self.submit(compare, sr, hr, self.images.scale, rgb=not self.images.benchmark)
            if self.results:
                self.results.save(row | quality.result(), cost, lr=lr, sr=sr, masks=masks_of(cost))
            return row, quality, cost.without_masks()

    def _upscale(self, lr):
        """An image (H, W, C) -> (sH, sW, C) of the same type, its Cost, and the seconds it took."""
        x = self.model.to_input(lr[None])
        if self.warm_up:
            self.predict(x)
        self.warm_up = False
        synchronize(self.model.device)
        started = time.perf_counter()
        sr, cost = self.predict(x)
        synchronize(self.model.device)
        seconds = time.perf_counter() - started
        return to_numpy(self.model.to_images(sr, lr.dtype)[0]), cost, seconds


@contextlib.contextmanager
def _report_lack_of_memory(name, lr):
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = lr.shape[:2]
        raise InputError(
            f"{name}: not enough memory for an image of {height}x{width} pixels; process it in tiles (chop), "
            "or in smaller ones (chop_size)",
            argument="chop",
        ) from None


@contextlib.contextmanager
def _background(device):
    """How to compute something while a GPU goes on: submit(function, ...) returns its Future. On a CPU, at once."""
    if device.type == "cpu":
        yield _compute_at_once
        return
    slots = threading.Semaphore(MAX_WAITING)

    def submit(function, *args, **options):
        slots.acquire()
        future = pool.submit(function, *args, **options)
        future.add_done_callback(lambda _: slots.release())
        return future

    with ThreadPoolExecutor() as pool:
        yield submit


def _compute_at_once(function, *args, **options):
    future = Future()
    future.set_result(function(*args, **options))
    return future


def _measure(measures, sr, hr, scale):
    """{name: value} of all measures."""
    sr, hr = shave(sr, scale), None if hr is None else shave(hr, scale)
    return {name: measure(sr, hr) for name, measure in measures.items()}


def _summarize(rows: Sequence[dict], costs: Sequence[Cost], scale: int) -> Metrics:
    """The means over a set, and the rows of its images. An image met exactly, with infinite PSNR, spoils no mean."""

    def mean(values):
        return sum(values) / len(rows)

    if not rows:
        return {"n_images": 0, "images": []}
    means = {key: _mean_of_finite([row[key] for row in rows]) for key in _quality(rows[0])}
    if "perceptual" in rows[0]:
        names = rows[0]["perceptual"]
        means["perceptual"] = {name: _mean_of_finite([row["perceptual"][name] for row in rows]) for name in names}
    return means | {
        "n_images": len(rows),
        "seconds_per_image": mean(row["seconds"] for row in rows),
        "gmacs": mean(cost.macs for cost in costs) / 1e9,
        "gmacs_dense": mean(cost.macs_dense for cost in costs) / 1e9,
        "gmacs_run": mean(cost.macs_run for cost in costs) / 1e9,
        "gmacs_at_1280x720": macs_at_1280x720(costs, "macs", scale) / 1e9,
        "gmacs_dense_at_1280x720": macs_at_1280x720(costs, "macs_dense", scale) / 1e9,
        "active_share": mean(cost.active_share for cost in costs),
        "images": list(rows),
    }


def mask_densities(metrics: Metrics) -> np.ndarray:
    """The density of each mask on each of N images, (N, K) in 0...1; K is 0 for a network without masks."""
    return np.array([row["mask_density"] for row in metrics["images"]], dtype=float)


def _quality(row: dict) -> list[str]:
    """The columns of a row that measure quality."""
    return [key for key in row if key.startswith(("psnr", "ssim"))]


def _mean_of_finite(values: Sequence[float]) -> float:
    """The mean without infinite and undefined values, or one of these if there is nothing else."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else values[0]


def _report_left_out(rows: Sequence[dict], set_name: str) -> None:
    """Name the images whose PSNR or SSIM is not a number that a mean can contain."""
    names = [row["name"] for row in rows if not all(math.isfinite(row[key]) for key in _quality(row))]
    if names and len(names) < len(rows) and distributed.is_main_process():
        logger.warning(
            f"{set_name}: the means leave out what is infinite (an image without any error) or undefined (one that is "
            f"too small) for {', '.join(names)}"
        )


def masks_of(cost: Cost) -> np.ndarray:
    """The masks of a single image, bool (K, H, W); K is 0 for a network without masks."""
    return np.array([mask[0, 0].cpu().numpy() for mask in cost.masks])


def macs_at_1280x720(costs: Sequence[Cost], count: str, scale: int) -> float:
    """The named count of `Cost` for an output of 1280 x 720 pixels, the size for which the paper reports it."""
    pixels = sum(cost.pixels for cost in costs)
    return sum(getattr(cost, count) for cost in costs) / pixels * (1280 * 720 / scale**2)


def compare(sr: np.ndarray, hr: np.ndarray | None, scale: int, rgb: bool = False) -> dict[str, float]:
    """PSNR (dB) and SSIM of uint8 images (H, W, C) on Y with `scale` border pixels shaved, as for benchmark sets.

    With `rgb`, also PSNR on RGB with `scale + 6` pixels shaved, as for DIV2K. Without an HR image both are nan.
    """
    if hr is None:
        return {"psnr_y": math.nan, "ssim_y": math.nan}
    sr_y, hr_y = shave(luma(sr), scale), shave(luma(hr), scale)
    measured = {"psnr_y": psnr(sr_y, hr_y), "ssim_y": ssim(sr_y, hr_y)}
    if rgb:
        measured["psnr_rgb"] = psnr(shave(sr, scale + 6), shave(hr, scale + 6))
    return measured


def headline(metrics: Metrics) -> tuple[str, float]:
    """The name and value of the PSNR that is reported for a set: on RGB where its protocol asks for it, else on Y."""
    name = "psnr_rgb" if "psnr_rgb" in metrics else "psnr_y"
    return name, metrics[name]


def table(metrics: Metrics) -> list[str]:
    """The lines of a table: every image and the mean, with PSNR and SSIM where there are HR images."""
    quality, costs = {}, {"active_share": ("active", ".3f"), "seconds": ("seconds", ".3f")}
    psnr_name, psnr_mean = headline(metrics)
    if not math.isnan(psnr_mean):
        quality = {psnr_name: (psnr_name, ".2f"), "ssim_y": ("ssim_y", ".4f")}
    columns = quality | {name: (name, ".4f") for name in metrics.get("perceptual", {})} | costs
    rows = [*metrics["images"], metrics | {"name": "mean", "seconds": metrics["seconds_per_image"]}]
    width = max(len(metrics["dataset"]), *(len(row["name"]) for row in rows))
    lines = [f"{metrics['dataset']:{width}}" + "".join(f"  {title:>8}" for title, _ in columns.values())]
    for row in (row | row.get("perceptual", {}) for row in rows):
        cells = ((title, format(row[key], form)) for key, (title, form) in columns.items())
        numbers = "".join(f"  {text:>{max(8, len(title))}}" for title, text in cells)
        lines.append(f"{row['name']:{width}}{numbers}")
    return lines
