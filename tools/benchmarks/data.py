"""Compare how fast training patches are loaded with each kind of cache (--ext of main.py).

    python tools/benchmark.py data

Pairs of the size of DIV2K's images are written to a temporary folder, mirrored from a photograph. The kinds take turns:
in every round, each is read by a data loader like main.py's for --seconds, until its patches are on --device. The
results are medians over the rounds. All files are read once before the first round that counts, so they are in the page
cache of the system.

    pickle  the baseline: every patch unpickles whole images, and workers send patches as float32 planes
    img     every patch decodes PNG files
    sep     memory-mapped .npy files
    bin     arrays in memory
    device  images in the memory of --device, which cuts the patches
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import PatchSettings, find_set
from data.device import DeviceLoader
from data.image import write_png
from data.imageset import ImageSet
from data.resize import crop_to_multiple, downscale
from data.srdata import EpochSampler, Patches, PatchLoader
from option import count, file_to_write, positive_float, positive_int
from program import InputError
from tools.benchmarks.baselines import PickledPatches
from tools.benchmarks.inference import mirrored_photograph, parse_size
from tools.benchmarks.timing import say
from utility import pick_device, synchronize, write_json

KINDS = ("pickle", "img", "sep", "bin", "device")
SCALE, N_COLORS = 2, 3
WARM_UP_STEPS = 8  # batches in the first round; their speed determines the number of batches in the other rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=parse_size,
        default=(1356, 2040),
        metavar="HxW",
        help="size of the HR images (default: 1356x2040)",
    )
    parser.add_argument("--images", type=positive_int, default=8, help="number of image pairs")
    parser.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels per side of a patch")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="patches per batch")
    parser.add_argument("--n_threads", type=count, default=1, help="number of data-loading worker processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--seconds", type=positive_float, default=2, help="duration of a round per kind of cache")
    parser.add_argument("--rounds", type=positive_int, default=5, help="number of rounds")
    parser.add_argument("--json", type=file_to_write(".json"), metavar="FILE", help="write the results to this file")


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, and write the results where --json asks for it. Raises InputError."""
    hr_patch_size = args.patch_size * SCALE
    if min(args.size) < hr_patch_size:
        height, width = args.size
        raise InputError(
            f"--size {height}x{width}: too small for HR patches of {hr_patch_size}x{hr_patch_size} pixels, "
            f"x{SCALE} of --patch_size {args.patch_size}; choose larger images or smaller patches"
        )
    speeds = measure(args)
    print(f"{'kind':8} {'patches/s':>10} {'speedup':>8}")
    for kind, speed in speeds.items():
        print(f"{kind:8} {speed:10.1f} {speed / speeds['pickle']:8.2f}")
    if args.json:
        settings = {key: getattr(args, key) for key in ("size", "patch_size", "batch_size", "n_threads")}
        write_json(args.json, settings | {"patches_per_second": speeds})


def measure(args: argparse.Namespace) -> dict[str, float]:
    """{kind of cache: patches per second}"""
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "Pairs", args.images, args.size)
        images = find_set("Pairs", folder, SCALE)
        device = pick_device(args.device)
        loaders = {kind: build_loader(kind, images, args, device) for kind in KINDS}
        speeds = {kind: [] for kind in KINDS}
        for index in range(args.rounds + 1):
            say(f"reading patches, round {index} of {args.rounds}")
            for kind, loader in loaders.items():
                speed = _patches_per_second(loader, device)
                speeds[kind].append(speed)
                loader.sampler.steps = max(WARM_UP_STEPS, round(args.seconds * speed / args.batch_size))
    return {kind: statistics.median(values[1:]) for kind, values in speeds.items()}


def write_pairs(root: Path, n_images: int, size: tuple[int, int], scale: int = SCALE) -> None:
    """Write a paired set of n_images different images below `root`; size: (height, width) of the HR images."""
    photograph = crop_to_multiple(mirrored_photograph(*size, N_COLORS), scale)
    say(f"writing {n_images} pairs of images")
    for index in range(n_images):
        hr = np.roll(photograph, 100 * index, axis=1)
        write_png(root / f"HR/{index}.png", hr)
        write_png(root / f"LR_bicubic/X{scale}/{index}.png", downscale(hr, scale))


def build_loader(
    kind: str, images: ImageSet, args: argparse.Namespace, device: torch.device
) -> DataLoader | DeviceLoader:
    """The loader of a kind in KINDS, for the options of this benchmark."""
    settings = PatchSettings(
        patch_size=args.patch_size,
        ext="img" if kind == "pickle" else kind,
        batch_size=args.batch_size,
        n_threads=args.n_threads,
    )
    sampler = EpochSampler(args.images, WARM_UP_STEPS, args.batch_size)
    if kind == "device":
        return DeviceLoader(Patches([images], SCALE, N_COLORS, settings), sampler, device, args.n_threads)
    if kind != "pickle":
        return PatchLoader(Patches([images], SCALE, N_COLORS, settings), sampler, args.n_threads, device)
    return DataLoader(
        PickledPatches([images], SCALE, N_COLORS, settings),
        batch_size=args.batch_size,
        sampler=sampler,
        num_workers=args.n_threads,
        persistent_workers=args.n_threads > 0,
    )


def _patches_per_second(loader, device):
    """The speed over all batches except the first, which waits until the workers have started."""
    batches = iter(loader)
    next(batches)
    synchronize(device)
    started = time.perf_counter()
    count = sum(len(hr.to(device, non_blocking=True)) for _, hr in batches)
    synchronize(device)
    return count / (time.perf_counter() - started)
