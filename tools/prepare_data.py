"""Prepare image sets for main.py. Existing files are kept, so an interrupted command can be repeated.

    python tools/prepare_data.py train --hr DIR [DIR ...] --name NAME --scales 2 3 4 --out OUT
        Make a training set: OUT/NAME/HR/*.png and OUT/NAME/LR_bicubic/X<s>/*.png. Unusable images are skipped and
        listed.
    python tools/prepare_data.py benchmark --hr DIR --name NAME --scales 2 3 4 --out testsets
        Make a benchmark set in OUT/benchmark/NAME. An unusable image is an error.
    python tools/prepare_data.py div2k --archive_dir DIR --out OUT
        Write OUT/DIV2K/DIV2K_train_HR and so on from the published archives or folders.
    python tools/prepare_data.py check DIR --scale S
        Describe a set and list its problems. The exit code is 1 if there are any.

LR images are made like MATLAB's bicubic imresize; HR images are cropped to a multiple of all scales.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image import image_size, list_images, read_image, write_png
from data.imageset import lr_names
from data.resize import crop_to_multiple, downscale
from option import RESERVED_SET_NAMES, Parser, plain_name, positive_int
from picture import skipped_files
from tools import check_data, unpack_div2k
from utility import InputError, in_parallel, run_program

OUT_HELP = "folder to write to; pass it to main.py as --dir_data"


@dataclass(frozen=True)
class TargetSet:
    """The set to write."""

    root: Path  # HR images go to <root>/HR, LR images to <root>/LR_bicubic/X<s>
    names: frozenset[str]  # of all images
    scales: tuple[int, ...]
    min_size: int  # HR pixels that each side must have after cropping

    @property
    def multiple(self) -> int:
        """The sides of HR images are cropped to a multiple of this."""
        return math.lcm(*self.scales)


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,benchmark,div2k,check}")
    train = commands.add_parser("train", help="make a training set")
    _add_set_arguments(train)
    train.add_argument("--min_size", type=positive_int, default=1, help="skip images with a side below this (pixels)")
    benchmark = commands.add_parser("benchmark", help="make a benchmark set")
    _add_set_arguments(benchmark)
    benchmark.set_defaults(min_size=1)
    div2k = commands.add_parser("div2k", help="unpack DIV2K")
    div2k.set_defaults(run=unpack_div2k.run)
    div2k.add_argument("--archive_dir", type=Path, required=True, help="folder with the archives or unpacked folders")
    div2k.add_argument("--out", type=Path, required=True, help=OUT_HELP)
    check = commands.add_parser("check", help="look for problems in a set")
    check.set_defaults(run=check_data.run)
    check.add_argument("folder", type=Path, metavar="DIR", help="folder with HR and LR_bicubic, or of DIV2K")
    check.add_argument("--scale", type=positive_int, required=True, help="scale of the LR images to check")
    for command in commands.choices.values():
        command.add_argument(
            "--n_threads", type=positive_int, default=os.cpu_count() or 1, help="images to process in parallel"
        )
    return parser.parse_args(argv)


def _add_set_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=make_set)
    command.add_argument("--hr", type=Path, nargs="+", required=True, help="folders of HR images in any format")
    command.add_argument("--name", type=plain_name, required=True, help="name of the set")
    command.add_argument("--scales", type=positive_int, nargs="+", required=True, help="upscaling factors, e.g. 2 3 4")
    command.add_argument("--out", type=Path, required=True, help=OUT_HELP)


# ---- training and benchmark sets -------------------------------------------------------------------------------------


def make_set(args: argparse.Namespace) -> None:
    """Make a training set or a benchmark set.

    Raises InputError for an unusable image of a benchmark set, and if a training set has no usable image.
    """
    if args.name in RESERVED_SET_NAMES:
        raise InputError(f"--name {args.name}: main.py reserves this name; choose another")
    benchmark = args.command == "benchmark"
    root = args.out / "benchmark" / args.name if benchmark else args.out / args.name
    sources = _find_sources(args.hr)
    target = TargetSet(root, frozenset(sources), tuple(args.scales), args.min_size)
    prepare = functools.partial(_prepare if benchmark else _prepare_or_skip, target=target)
    reasons = [reason for reason in in_parallel(prepare, list(sources.items()), args.n_threads, root.name) if reason]
    for reason in reasons:
        print(f"skipped {reason}")
    if reasons and (root / "HR").resolve() in [folder.resolve() for folder in args.hr]:
        raise InputError(f"{root / 'HR'}: cannot use {len(reasons)} of its images (see above); remove them")
    if len(reasons) == len(sources):
        raise InputError(
            f"--hr {' '.join(map(str, args.hr))}: no usable image ({len(reasons)} skipped, see above); "
            f"pass other folders"
        )
    count = len(list_images(root / "HR"))
    summary = f"{count} image{'s' * (count != 1)}" + f", {len(reasons)} skipped" * bool(reasons)
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


def _prepare_or_skip(source: tuple[str, Path], target: TargetSet) -> str | None:
    """`_prepare`; returns the reason if the image is unusable."""
    try:
        _prepare(source, target)
    except InputError as error:
        return str(error)
    return None


def _prepare(source: tuple[str, Path], target: TargetSet) -> None:
    """Write the HR image and the LR images of one (name, path) if they are missing. Raises InputError."""
    name, path = source
    size = image_size(path)
    _check_size(path, size, target)
    hr = target.root / "HR" / f"{name}.png"
    if path.parent.resolve() != hr.parent.resolve():
        if not hr.exists():
            write_png(hr, crop_to_multiple(read_image(path), target.multiple))
        elif image_size(hr) != _cropped(size, target.multiple):
            raise InputError(f"{hr}: already exists, made from another image than {path}; rename or remove {path}")
        path = hr  # the LR images are made from the HR image of the set
    folders = {scale: target.root / "LR_bicubic" / f"X{scale}" for scale in target.scales}
    missing = [
        scale
        for scale, folder in folders.items()
        if not any((folder / f"{lr_name}.png").exists() for lr_name in lr_names(name, scale, target.names))
    ]
    image = read_image(path) if missing else None
    for scale in missing:
        write_png(folders[scale] / f"{name}.png", downscale(crop_to_multiple(image, scale), scale))


def _check_size(path: Path, size: tuple[int, int], target: TargetSet) -> None:
    """Raises InputError if a side is too short."""
    height, width = size
    if min(size) < target.multiple:
        scales = " ".join(map(str, target.scales))
        raise InputError(
            f"{path}: {height}x{width} is below {target.multiple}, the least common multiple of --scales {scales}; "
            f"remove it"
        )
    if min(size) < target.min_size:
        raise InputError(f"{path}: {height}x{width} is below --min_size {target.min_size}")
    cropped = _cropped(size, target.multiple)
    if min(cropped) < target.min_size:
        raise InputError(
            f"{path}: {height}x{width}, cropped to {cropped[0]}x{cropped[1]}, is below --min_size {target.min_size}"
        )


def _cropped(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size of an image after `crop_to_multiple`."""
    height, width = size
    return height - height % multiple, width - width % multiple


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    return args.run(args)


if __name__ == "__main__":
    run_program(main)
