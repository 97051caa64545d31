"""Show a part of an image as upscaled by several methods, side by side, as papers print it.

    python tools/compare.py --image HR.png --crop 120,80,60,40 --methods bicubic SMSR.pt hr --output strip.png

--image is a high-resolution image; its LR image is made like MATLAB's bicubic imresize. PSNR (dB) and SSIM are measured
on the whole image with the protocol of benchmark sets.

Each method is "bicubic", "hr" (the image itself) or a file of SMSR or EDSR weights. All weights must have one scale.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image import read_image
from data.resize import crop_to_multiple, downscale, upscale
from evaluation import compare
from files import check_outputs, check_replaced, write_whole
from model import load_model
from model.network import Network
from option import Parser, file_to_write, positive_int
from program import InputError, run_program
from visualize import FIGURE_MARK, comparison


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--image", type=Path, required=True, help="high-resolution image")
    parser.add_argument("--crop", type=crop, required=True, metavar="X,Y,W,H", help="part of the image, in pixels")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="bicubic, hr or a weights file")
    parser.add_argument("--scale", type=positive_int, help="upscaling factor (default: the scale of the weights)")
    parser.add_argument("--output", type=file_to_write(".png"), required=True, metavar="FILE.png", help="file to write")
    return parser.parse_args(argv)


def crop(text: str) -> tuple[int, int, int, int]:
    """The argparse type of --crop: "120,80,60,40" -> (x, y, width, height)."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdigit() for number in numbers) or "0" in numbers[2:]:
        raise argparse.ArgumentTypeError(f"{text!r} does not have the form 120,80,60,40 (left, top, width, height)")
    x, y, width, height = map(int, numbers)
    return x, y, width, height


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_outputs([args.output], [args.image, *args.methods], argument="output")
    check_replaced(args.output, FIGURE_MARK, argument="output")
    image, networks = read_image(args.image), load_networks(args.methods)
    scale = common_scale(networks.values(), args.scale)
    hr = crop_to_multiple(image, scale)
    if not hr.size:
        raise InputError(f"--image {args.image}: the image is smaller than {scale} pixels; choose a larger one")
    x, y, width, height = args.crop
    if x + width > hr.shape[1] or y + height > hr.shape[0]:
        raise InputError(
            f"--crop {x},{y},{width},{height}: the crop extends beyond the image ({hr.shape[1]}x{hr.shape[0]}); "
            f"choose one inside it"
        )
    lr = downscale(hr, scale)
    panels = []
    for method in args.methods:
        sr, title = hr, "HR\nPSNR / SSIM"
        if method != "hr":
            sr = upscale(lr, scale) if method == "bicubic" else networks[method].upscale(lr)
            metrics = compare(sr, hr, scale)
            title = f"{_label(method)}\n{metrics['psnr_y']:.2f} dB / {metrics['ssim_y']:.4f}"
            print(title.replace("\n", ": "))
        panels.append((sr[y : y + height, x : x + width], title))
    write_whole(args.output, comparison((hr, args.image.stem), args.crop, panels))
    print(f"written to {args.output}")


def load_networks(methods: Iterable[str]) -> dict[str, Network]:
    """{method: network} of the methods that are weights files. Raises InputError."""
    paths = [method for method in methods if method not in ("bicubic", "hr")]
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"--methods {path}: no such file; pass bicubic, hr or a file of weights")
    return {path: load_model(path) for path in paths}


def common_scale(networks: Iterable[Network], scale: int | None = None) -> int:
    """The scale of all networks and, if given, of --scale. Raises InputError if there is none, or more than one."""
    scales = {model.scale for model in networks} | ({scale} if scale else set())
    if not scales:
        raise InputError("--methods: no method is a network that determines the scale; pass --scale")
    if len(scales) > 1:
        found = ", ".join(f"x{scale}" for scale in sorted(scales))
        raise InputError(f"--methods: found several scales ({found}); all weights and --scale must have the same one")
    return scales.pop()


def _label(method: str) -> str:
    """The name of the run for weights in experiment/NAME/model, otherwise the name of the file."""
    path = Path(method)
    return path.parent.parent.name if path.parent.name == "model" else path.stem


if __name__ == "__main__":
    run_program(main)
