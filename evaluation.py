"""Run a network over a set of images and measure it."""

import math
import time
from dataclasses import replace

import numpy as np
from tqdm import tqdm

import distributed
from metrics import luma, psnr, quantize, shave, ssim
from utility import InputError, is_out_of_memory, synchronize


def evaluate(model, images, run=None, rgb_range=255, save=None, warm_up=True):
    """Run a model over a WholeImages set.

    Benchmark sets are measured on Y, `scale` border pixels shaved; other sets on RGB too, `scale + 6` shaved.
    Where several processes run, each takes a share of the images; all return the numbers of all images.

    Args:
        run: LR (1, C, H, W) -> SR and Work, see model/inference.py; None: model.inference
        save: called with (name, LR, SR, masks) for each image: uint8 (H, W, C), and bool (K, H, W) without padding
        warm_up: run the first image once before the clock starts

    Returns:
        the dict of metrics.json; without HR images its PSNR and SSIM are nan
    """
    model.eval()
    run = run or model.inference
    parameter = next(model.parameters())
    measured = []  # (row, Work) of each image of this process
    mine = range(distributed.rank(), len(images), distributed.world_size())
    with tqdm(mine, desc=images.name, unit="image", leave=False, disable=distributed.is_helper()) as progress:
        for index in progress:
            name, lr, hr = images[index]
            x = lr[None].to(parameter.device, parameter.dtype) * (rgb_range / 255)
            try:
                if warm_up and index == mine.start:
                    run(x)
                synchronize(parameter.device)
                started = time.perf_counter()
                sr, work = run(x)
                synchronize(parameter.device)
                seconds = time.perf_counter() - started
                sr = quantize(sr[0], rgb_range)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                height, width = x.shape[2:]
                raise InputError(
                    f"{name}: not enough memory for an image of {height}x{width} pixels; "
                    "add --chop, or with it a smaller --chop_size"
                ) from None
            if save:
                save(name, quantize(lr, 255), sr, masks_of(work))
            row = {"name": name, "lr_shape": list(lr.shape[1:])}
            row |= compare(sr, hr, images.scale, rgb=not images.benchmark)
            row |= {"seconds": seconds, "mask_density": work.mask_density, "active_share": work.active_share}
            measured.append((row, replace(work, masks=())))
    shares = distributed.gather(measured)  # one image after the other, as they were dealt out
    rows, works = zip(*(shares[i % len(shares)][i // len(shares)] for i in range(len(images))), strict=True)

    def mean(values):
        return sum(values) / len(rows)

    columns = [key for key in rows[0] if key.startswith(("psnr", "ssim"))]
    return (
        {"dataset": images.name, "scale": images.scale, "model": type(model).__name__}
        | {"parameters": sum(p.numel() for p in model.parameters())}
        | {key: mean(row[key] for row in rows) for key in columns}
        | {
            "n_images": len(rows),
            "seconds_per_image": mean(row["seconds"] for row in rows),
            "gmacs": mean(work.macs for work in works) / 1e9,
            "gmacs_dense": mean(work.macs_dense for work in works) / 1e9,
            "gmacs_run": mean(work.macs_run for work in works) / 1e9,
            "gmacs_at_1280x720": at_1280x720(works, "macs", images.scale),
            "gmacs_dense_at_1280x720": at_1280x720(works, "macs_dense", images.scale),
            "active_share": mean(work.active_share for work in works),
            "images": list(rows),
        }
    )


def masks_of(work):
    """The masks of one image, bool array (K, H, W); K is 0 for a network that has none."""
    return np.array([mask[0, 0].cpu().numpy() for mask in work.masks])


def at_1280x720(works, count, scale):
    """The named count of `Work`, in 1e9, of an output of 1280 x 720 pixels, on which the paper counts them."""
    pixels = sum(work.pixels for work in works)
    return sum(getattr(work, count) for work in works) / pixels * (1280 * 720 / scale**2) / 1e9


def compare(sr, hr, scale, rgb=False):
    """PSNR and SSIM of uint8 images (H, W, C), by the protocol of benchmark sets and, if `rgb`, that of DIV2K."""
    if hr is None:
        return {"psnr_y": math.nan, "ssim_y": math.nan}
    sr_y, hr_y = shave(luma(sr), scale), shave(luma(hr), scale)
    measured = {"psnr_y": psnr(sr_y, hr_y), "ssim_y": ssim(sr_y, hr_y)}
    if rgb:
        measured["psnr_rgb"] = psnr(shave(sr, scale + 6), shave(hr, scale + 6))
    return measured


def headline(metrics):
    """(name, value) of the PSNR that a set is known by: on RGB where the protocol says so, else on Y."""
    name = "psnr_rgb" if "psnr_rgb" in metrics else "psnr_y"
    return name, metrics[name]


def table(metrics):
    """The lines of `evaluate`'s result, image by image and mean; PSNR and SSIM where there were HR images."""
    columns = {"active_share": ("active", ".3f"), "seconds": ("seconds", ".3f")}
    psnr_name, psnr_mean = headline(metrics)
    if not math.isnan(psnr_mean):
        columns = {psnr_name: (psnr_name, ".2f"), "ssim_y": ("ssim_y", ".4f")} | columns
    rows = [*metrics["images"], metrics | {"name": "mean", "seconds": metrics["seconds_per_image"]}]
    width = max(len(metrics["dataset"]), *(len(row["name"]) for row in rows))
    lines = [f"{metrics['dataset']:{width}}" + "".join(f"  {title:>8}" for title, _ in columns.values())]
    for row in rows:
        numbers = "".join(f"  {format(row[key], form):>8}" for key, (_, form) in columns.items())
        lines.append(f"{row['name']:{width}}{numbers}")
    return lines
