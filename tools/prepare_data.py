"""Make LR images as MATLAB's bicubic does, and lay them out as main.py reads them.

    python tools/prepare_data.py train --hr DIR [DIR ...] --name NAME --scales 2 3 4 --out OUT
        -> OUT/NAME/HR/*.png, OUT/NAME/LR_bicubic/X<s>/*.png
    python tools/prepare_data.py benchmark --hr DIR --name NAME --scales 2 3 4 --out testsets
        -> OUT/benchmark/NAME/...

HR images are cut to a multiple of all scales. What is there already stays as it is, also where its source changed.
"""

import argparse
import math
import sys
from pathlib import Path

import imageio.v3 as iio
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image import image_size, list_images, read_image
from data.resize import crop_to_multiple, downscale
from option import Parser, plain_name, positive_int
from utility import InputError, run_program, write_whole


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("train", "benchmark"), help="a set to train on, or one to measure on")
    parser.add_argument("--hr", type=Path, nargs="+", required=True, help="folders of HR images of any kind")
    parser.add_argument("--name", type=plain_name, required=True, help="of the set")
    parser.add_argument("--scales", type=positive_int, nargs="+", required=True, help="such as 2 3 4")
    parser.add_argument("--out", type=Path, required=True, help="where to write; then main.py's --dir_data")
    return parser.parse_args(argv)


def prepare(hr_folders, root, scales):
    """Write <root>/HR and <root>/LR_bicubic/X<s>. Raises InputError."""
    sources = {}
    for folder in hr_folders:
        for name, path in list_images(folder).items():
            if name in sources:
                raise InputError(f"{path}: has the name of {sources[name]}; rename one of the two")
            sources[name] = path
    if not sources:
        raise InputError(f"--hr {' '.join(map(str, hr_folders))}: no images there")
    multiple = math.lcm(*scales)
    with tqdm(sources.items(), desc=root.name, unit="image") as progress:
        for name, path in progress:
            if min(image_size(path)) < multiple:
                raise InputError(f"{path}: is smaller than {multiple} pixels; take it out")
            hr = root / "HR" / f"{name}.png"
            lr = {scale: root / "LR_bicubic" / f"X{scale}" for scale in scales}
            if path.parent.resolve() != hr.parent.resolve():
                if not hr.exists():
                    _write(hr, crop_to_multiple(read_image(path), multiple))
                path = hr  # LR is made of the HR image as it lies there
            missing = [scale for scale, folder in lr.items() if not _has_image(folder, name, scale)]
            image = read_image(path) if missing else None
            for scale in missing:
                _write(lr[scale] / f"{name}.png", downscale(crop_to_multiple(image, scale), scale))


def _has_image(folder, name, scale):
    return any((folder / f"{name}{suffix}.png").exists() for suffix in ("", f"x{scale}"))


def _write(path, image):
    write_whole(path, iio.imwrite("<bytes>", image, extension=".png"))


def main(argv=None):
    args = parse(argv)
    root = args.out / "benchmark" / args.name if args.kind == "benchmark" else args.out / args.name
    prepare(args.hr, root, args.scales)
    print(f"{root}: ready; use it with --dir_data {args.out} and the name {args.name}")


if __name__ == "__main__":
    run_program(main)
