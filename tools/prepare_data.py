"""Prepare sets of images for main.py, in parallel; what is there already is kept, so an interrupted call goes on.

    python tools/prepare_data.py train --hr DIR [DIR ...] --name NAME --scales 2 3 4 --out OUT
        -> OUT/NAME/HR/*.png, OUT/NAME/LR_bicubic/X<s>/*.png; images that cannot serve are left out, and said
    python tools/prepare_data.py benchmark --hr DIR --name NAME --scales 2 3 4 --out testsets
        -> OUT/benchmark/NAME/...
    python tools/prepare_data.py div2k --archive_dir DIR --out OUT
        -> OUT/DIV2K/DIV2K_train_HR and so on, from the published archives or folders
    python tools/prepare_data.py check DIR --scale S
        says what is in a set and what is wrong with it; exit code 1 if anything is

LR images are made as MATLAB's bicubic makes them; HR images are cut to a multiple of all scales.
"""

import argparse
import functools
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.benchmark import lr_names
from data.image import image_size, list_images, read_image, write_png
from data.resize import crop_to_multiple, downscale
from option import OF_NO_SET, Parser, plain_name, positive_int
from tools import check_data, unpack_div2k
from utility import InputError, in_parallel, run_program


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,benchmark,div2k,check}")
    for name, what in (("train", "a set to train on"), ("benchmark", "a set to measure on")):
        command = commands.add_parser(name, help=f"make {what}")
        command.set_defaults(run=make)
        command.add_argument("--hr", type=Path, nargs="+", required=True, help="folders of HR images of any kind")
        command.add_argument("--name", type=plain_name, required=True, help="of the set")
        command.add_argument("--scales", type=positive_int, nargs="+", required=True, help="such as 2 3 4")
        command.add_argument("--out", type=Path, required=True, help="where to write; then main.py's --dir_data")
        if name == "train":
            command.add_argument(
                "--min_size", type=positive_int, default=1, help="leave out images with less pixels on a side"
            )
    command = commands.add_parser("div2k", help="unpack DIV2K")
    command.set_defaults(run=unpack_div2k.main)
    command.add_argument("--archive_dir", type=Path, required=True, help="folder of the archives, or of folders")
    command.add_argument("--out", type=Path, required=True, help="where to write; then main.py's --dir_data")
    command = commands.add_parser("check", help="look for mistakes in a set")
    command.set_defaults(run=check_data.main)
    command.add_argument("folder", type=Path, metavar="DIR", help="of the set, with HR and LR_bicubic in it; or DIV2K")
    command.add_argument("--scale", type=positive_int, required=True)
    for command in commands.choices.values():
        command.add_argument("--n_threads", type=positive_int, default=os.cpu_count() or 1, help="images at a time")
    return parser.parse_args(argv)


def make(args):
    """Make a set to train or to measure on."""
    benchmark = args.command == "benchmark"
    if args.name in OF_NO_SET:
        raise InputError(f"--name {args.name}: main.py means something else by it; choose another")
    root = args.out / "benchmark" / args.name if benchmark else args.out / args.name
    sources = _sources(args.hr)
    multiple = math.lcm(*args.scales)
    least = multiple if benchmark else -(-args.min_size // multiple) * multiple  # that remains after cropping
    prepare = functools.partial(
        _prepare, root=root, names=sources.keys(), scales=args.scales, multiple=multiple, least=least
    )
    if not benchmark:
        prepare = functools.partial(_or_reason, prepare)
    reasons = [reason for reason in in_parallel(prepare, list(sources.items()), args.n_threads, root.name) if reason]
    for reason in reasons:
        print(f"left out: {reason}")
    if reasons and (root / "HR").resolve() in [folder.resolve() for folder in args.hr]:
        raise InputError(f"{root / 'HR'}: {len(reasons)} of its images cannot serve, see above; take them out of it")
    if len(reasons) == len(sources):
        raise InputError(f"--hr {' '.join(map(str, args.hr))}: none of {len(sources)} images can serve")
    count = f"{len(list_images(root / 'HR'))} images" + f", {len(reasons)} left out" * bool(reasons)
    print(f"{root}: {count}; use it with --dir_data {args.out} and the name {args.name}")


def _sources(folders):
    """{name without ending: path} of the images of all folders. Raises InputError."""
    sources = {}
    for folder in dict.fromkeys(folders):
        for name, path in list_images(folder).items():
            if name in sources:
                raise InputError(f"{path}: has the name of {sources[name]}; rename one of the two")
            sources[name] = path
    if not sources:
        raise InputError(f"--hr {' '.join(map(str, folders))}: no images there")
    return sources


def _or_reason(prepare, source):
    """None, or why the image cannot serve."""
    try:
        return prepare(source)
    except InputError as error:
        return str(error)


def _prepare(source, root, names, scales, multiple, least):
    """Write <root>/HR/<name>.png and <root>/LR_bicubic/X<s>/<name>.png where they are missing. Raises InputError.

    names: of all images of the set
    """
    name, path = source
    height, width = image_size(path)
    if min(height, width) < least:
        raise InputError(f"{path}: {height}x{width} is smaller than {least} pixels; take it out")
    hr = root / "HR" / f"{name}.png"
    lr = {scale: root / "LR_bicubic" / f"X{scale}" for scale in scales}
    if path.parent.resolve() != hr.parent.resolve():
        if not hr.exists():
            write_png(hr, crop_to_multiple(read_image(path), multiple))
        elif image_size(hr) != (height - height % multiple, width - width % multiple):
            raise InputError(f"{hr}: is there already, of another image than {path}; rename that, or take it out")
        path = hr  # LR is made of the HR image as it lies there
    missing = [
        scale
        for scale, folder in lr.items()
        if not any((folder / f"{lr_name}.png").exists() for lr_name in lr_names(name, scale, names))
    ]
    image = read_image(path) if missing else None
    for scale in missing:
        write_png(lr[scale] / f"{name}.png", downscale(crop_to_multiple(image, scale), scale))


def main(argv=None):
    args = parse(argv)
    return args.run(args)


if __name__ == "__main__":
    run_program(main)
