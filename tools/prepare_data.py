"""Prepare image sets for main.py. Existing files are kept, so an interrupted command can be repeated.

    python tools/prepare_data.py download DIV2K --scales 2 --out dataset
    python tools/prepare_data.py download benchmark --out dataset
        Download a published set and unpack it: DIV2K, or Set5, Set14, B100
        and Urban100.

    python tools/prepare_data.py train --hr DIR [DIR ...] --name NAME
        --scales 2 3 4 --out OUT
        Make a training set: OUT/NAME/HR/*.png and
        OUT/NAME/LR_bicubic/X<s>/*.png. Unusable images are skipped and listed.
    python tools/prepare_data.py benchmark --hr DIR --name NAME
        --scales 2 3 4 --out testsets
        Make a benchmark set in testsets/benchmark/NAME. An unusable image is
        an error.
    python tools/prepare_data.py div2k --archive_dir DIR --out OUT
        Write OUT/DIV2K/DIV2K_train_HR and so on from the published archives or
        folders.
    python tools/prepare_data.py check DIR --scale S
        Describe a set and list its problems. The exit code is 1 if there are
        any.

HR images are written whole. The LR images of a scale are made like MATLAB's bicubic imresize, from HR images cropped
to a multiple of that scale. A file that already exists must hold what would be written; otherwise nothing is written.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image import list_images, read_image, write_png
from data.imageset import lr_names
from data.resize import crop_to_multiple, downscale
from option import RESERVED_SET_NAMES, Parser, plain_name, positive_int
from picture import skipped_files
from program import InputError, run_program, usable_processors
from tools.datasets import check as check_set
from tools.datasets import download, unpack
from utility import in_parallel

OUT_HELP = "folder to write to; pass it to main.py as --dir_data"


@dataclass(frozen=True)
class TargetSet:
    """The set to write."""

    root: Path  # HR images go to <root>/HR, LR images to <root>/LR_bicubic/X<s>
    names: frozenset[str]  # of all images
    scales: tuple[int, ...]
    min_size: int  # HR pixels that each side must have

    def hr(self, name: str) -> Path:
        """Where the HR image of this name lies."""
        return self.root / "HR" / f"{name}.png"

    def lr(self, name: str, scale: int) -> Path:
        """Where the LR image of this name lies, or is to be written."""
        folder = self.root / "LR_bicubic" / f"X{scale}"
        paths = [folder / f"{lr_name}.png" for lr_name in lr_names(name, scale, self.names)]
        return next((path for path in paths if path.exists()), paths[0])


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{download,train,benchmark,div2k,check}")
    download.add_arguments(commands.add_parser("download", help="download a published set and unpack it"))
    train = commands.add_parser("train", help="make a training set")
    _add_set_arguments(train)
    train.add_argument("--min_size", type=positive_int, default=1, help="skip images with a side below this (pixels)")
    benchmark = commands.add_parser("benchmark", help="make a benchmark set")
    _add_set_arguments(benchmark)
    benchmark.set_defaults(min_size=1)
    div2k = commands.add_parser("div2k", help="unpack DIV2K")
    div2k.set_defaults(run=unpack.run)
    div2k.add_argument("--archive_dir", type=Path, required=True, help="folder with the archives or unpacked folders")
    div2k.add_argument("--out", type=Path, required=True, help=OUT_HELP)
    check = commands.add_parser("check", help="look for problems in a set")
    check.set_defaults(run=check_set.run)
    check.add_argument("folder", type=Path, metavar="DIR", help="folder with HR and LR_bicubic, or of DIV2K")
    check.add_argument("--scale", type=positive_int, required=True, help="scale of the LR images to check")
    for command in commands.choices.values():
        command.add_argument(
            "--n_threads", type=positive_int, default=usable_processors(), help="images to process in parallel"
        )
    return parser.parse_args(argv)


def _add_set_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=make_set)
    command.add_argument("--hr", type=Path, nargs="+", required=True, help="folders of HR images in any format")
    command.add_argument("--name", type=plain_name, required=True, metavar="NAME", help="name of the set")
    command.add_argument("--scales", type=positive_int, nargs="+", required=True, help="upscaling factors, e.g. 2 3 4")
    command.add_argument("--out", type=Path, required=True, help=OUT_HELP)


# ---- training and benchmark sets -------------------------------------------------------------------------------------


def make_set(args: argparse.Namespace) -> None:
    """Make a training set or a benchmark set.

    Raises InputError if the set already holds other images, for an unusable image of a benchmark set, and if a training
    set has no usable image.
    """
    if args.name in RESERVED_SET_NAMES:
        raise InputError(f"--name {args.name}: main.py reserves this name; choose another")
    benchmark = args.command == "benchmark"
    root = args.out / "benchmark" / args.name if benchmark else args.out / args.name
    sources = _find_sources(args.hr)
    target = TargetSet(root, frozenset(sources), tuple(args.scales), args.min_size)
    if benchmark:
        _check_no_others(target)
    examine = functools.partial(_examine, target=target)
    reasons = in_parallel(examine, list(sources.items()), args.n_threads, f"check {root.name}")
    usable = [source for source, reason in zip(sources.items(), reasons, strict=True) if not reason]
    _report_skipped(args, [reason for reason in reasons if reason], root, n_usable=len(usable))
    in_parallel(functools.partial(_write, target=target), usable, args.n_threads, root.name)
    count, n_skipped = len(list_images(root / "HR")), len(sources) - len(usable)
    summary = f"{count} image{'s' * (count != 1)}" + f", {n_skipped} skipped" * bool(n_skipped)
    flag = "--data_test" if benchmark else "--data_train"
    print(f"{root}: {summary}; use it with --dir_data {args.out} {flag} {args.name}")


def _find_sources(folders: Iterable[Path]) -> dict[str, Path]:
    """{name without suffix: path} of the images in all folders. Prints other files. Raises InputError."""
    sources = {}
    for folder in dict.fromkeys(folders):
        for line in skipped_files(folder):
            print(line)
        for name, path in list_images(folder).items():
            if name in sources:
                raise InputError(f"{path}: has the same name as {sources[name]}; rename one of them")
            sources[name] = path
    if not sources:
        raise InputError(f"--hr {' '.join(map(str, folders))}: no images found; pass folders that contain images")
    return sources


def _check_no_others(target: TargetSet) -> None:
    """Raise InputError if the set already has images that are not among the sources: results would mix two sets."""
    folder = target.root / "HR"
    others = sorted(list_images(folder).keys() - target.names) if folder.is_dir() else []
    if others:
        raise InputError(
            f"{target.root}: already holds a set with other images ({others[0]} and {len(others) - 1} more are not in "
            f"--hr); choose another --name"
        )


def _report_skipped(args: argparse.Namespace, reasons: list[str], root: Path, n_usable: int) -> None:
    """Print why images are unusable. Raise InputError if the set cannot be made without them."""
    if reasons and args.command == "benchmark":
        raise InputError(reasons[0])
    for reason in reasons:
        print(f"skipped {reason}")
    if reasons and (root / "HR").resolve() in [folder.resolve() for folder in args.hr]:
        raise InputError(f"{root / 'HR'}: cannot use {len(reasons)} of its images (see above); remove them")
    if not n_usable:
        raise InputError(
            f"--hr {' '.join(map(str, args.hr))}: no usable image ({len(reasons)} skipped, see above); "
            f"pass other folders"
        )


def _examine(source: tuple[str, Path], target: TargetSet) -> str | None:
    """Why the image of one (name, path) is unusable, or None. Nothing is written.

    Raises InputError if the set already has an HR or LR image of this name that was not made from this image.
    """
    name, path = source
    try:
        image = read_image(path)
        _check_size(path, image.shape[:2], target)
    except InputError as error:
        return str(error)
    hr = target.hr(name)
    if hr.exists() and not hr.samefile(path) and not np.array_equal(read_image(hr), image):
        raise InputError(f"{hr}: already exists and is another image than {path}; choose another --name, or rename one")
    for scale in target.scales:
        lr = target.lr(name, scale)
        if lr.exists() and not check_set.is_bicubic(check_set.difference(image, read_image(lr), scale)):
            raise InputError(f"{lr}: already exists and was not made from {path} at x{scale}; remove it")
    return None


def _write(source: tuple[str, Path], target: TargetSet) -> None:
    """Write the HR image and the LR images of one (name, path) where they are missing."""
    name, path = source
    missing = [scale for scale in target.scales if not target.lr(name, scale).exists()]
    if target.hr(name).exists() and not missing:
        return
    image = read_image(path)
    if not target.hr(name).exists() and path.parent.resolve() != target.hr(name).parent.resolve():
        write_png(target.hr(name), image)
    for scale in missing:
        write_png(target.lr(name, scale), downscale(crop_to_multiple(image, scale), scale))


def _check_size(path: Path, size: tuple[int, int], target: TargetSet) -> None:
    """Raises InputError if a side is too short."""
    height, width = size
    if min(size) < max(target.scales):
        raise InputError(f"{path}: {height}x{width} is too small to be reduced by {max(target.scales)}; remove it")
    if min(size) < target.min_size:
        raise InputError(f"{path}: {height}x{width} is below --min_size {target.min_size}")


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    return args.run(args)


if __name__ == "__main__":
    run_program(main)
