"""Time the reading of training patches, by kind of cache (--ext).

    python tools/benchmark.py data

Pairs as large as those of DIV2K are made in a temporary folder, mirrored from a photograph. Each kind is read in
turns, by a DataLoader as main.py's, for --seconds a round; the numbers are medians of the rounds. Before the clock
starts the files were read once, so the system's page cache holds them.

    pickle  the baseline: whole images, unpickled for every patch, which leaves its worker as float32 planes
    img     PNG files, decoded for every patch
    sep     memory-mapped .npy files
    bin     arrays in memory
"""

import argparse
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import find_set
from data.image import read_image
from data.resize import downscale
from data.srdata import EpochSampler, Patches, PatchLoader
from option import Parser, count, positive_float, positive_int
from tools.benchmark import SAMPLE
from tools.benchmark import size as image_size
from utility import InputError, write_json

KINDS = ("pickle", "img", "sep", "bin")
SCALE = 2
WARM_UP = 8  # batches of the first round, which tells how many the others need


def parse(argv):
    parser = Parser(prog="benchmark.py data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=image_size, default=(1356, 2040), metavar="HxW", help="of an HR image")
    parser.add_argument("--images", type=positive_int, default=8, help="pairs of images")
    parser.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--n_threads", type=count, default=1, help="processes that read")
    parser.add_argument("--seconds", type=positive_float, default=2, help="of a round")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args(argv)


class PickledImages(Patches):
    """Patches whose sources are pickled whole images, given as float32 in contiguous memory."""

    def __init__(self, sets, scale, patch_size):
        super().__init__(sets, scale, patch_size, ext="img")
        self.hr_files, self.lr_files = ([_pickled(path) for path in paths] for paths in (self.hr, self.lr))

    def __getitem__(self, key):
        image = key[0]
        self.hr, self.lr = {image: _unpickled(self.hr_files[image])}, {image: _unpickled(self.lr_files[image])}
        return tuple(patch.contiguous().float() for patch in super().__getitem__(key))


def _pickled(path):
    target = path.with_suffix(".pickle")
    target.write_bytes(pickle.dumps(read_image(path)))
    return target


def _unpickled(path):
    with open(path, "rb") as file:
        return pickle.load(file)


def write_pairs(root, n_images, size):
    """Write a paired set of n_images below `root`."""
    photograph = read_image(SAMPLE / "HR/coffee.png")
    pad = [(0, max(0, goal - there)) for goal, there in zip(size, photograph.shape, strict=False)]
    photograph = np.pad(photograph, [*pad, (0, 0)], mode="symmetric")[
        : size[0] // SCALE * SCALE, : size[1] // SCALE * SCALE
    ]
    folders = {"HR": root / "HR", "LR": root / f"LR_bicubic/X{SCALE}"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for index in tqdm(range(n_images), desc="images", leave=False):
        hr = np.roll(photograph, 100 * index, axis=1)
        iio.imwrite(folders["HR"] / f"{index}.png", hr)
        iio.imwrite(folders["LR"] / f"{index}.png", downscale(hr, SCALE))


def measure(args):
    """{kind: patches a second}"""
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "Pairs", args.images, args.size)
        sets = [find_set("Pairs", folder, SCALE)]
        loaders = {}
        for kind in KINDS:
            sampler = EpochSampler(args.images, WARM_UP, args.batch_size)
            if kind == "pickle":
                loaders[kind] = DataLoader(
                    PickledImages(sets, SCALE, args.patch_size), args.batch_size, sampler=sampler,
                    num_workers=args.n_threads, persistent_workers=args.n_threads > 0,
                )  # fmt: skip
            else:
                patches = Patches(sets, SCALE, args.patch_size, ext=kind, n_threads=args.n_threads)
                loaders[kind] = PatchLoader(patches, sampler, args.n_threads)
        speeds = {kind: [] for kind in KINDS}
        for _ in tqdm(range(args.rounds + 1), desc="rounds", leave=False):
            for kind, loader in loaders.items():
                speed = _speed(loader)
                speeds[kind].append(speed)
                loader.sampler.steps = max(WARM_UP, round(args.seconds * speed / args.batch_size))
    return {kind: statistics.median(values[1:]) for kind, values in speeds.items()}


def _speed(loader):
    """Patches a second, of all batches but the first, with which the workers are up."""
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    return sum(len(lr) for lr, _ in batches) / (time.perf_counter() - started)


def main(argv):
    args = parse(argv)
    if min(args.size) < args.patch_size * SCALE:
        height, width = args.size
        raise InputError(f"--size {height}x{width}: holds no patch of --patch_size {args.patch_size} at x{SCALE}")
    speeds = measure(args)
    print(f"{'kind':8} {'patches/s':>10} {'speedup':>8}")
    for kind, speed in speeds.items():
        print(f"{kind:8} {speed:10.1f} {speed / speeds['pickle']:8.2f}")
    if args.json:
        settings = {key: getattr(args, key) for key in ("size", "patch_size", "batch_size", "n_threads")}
        write_json(args.json, settings | {"patches_per_second": speeds})
