"""Show a part of an image as several methods upscale it, side by side, as papers print it.

    python tools/compare.py --image HR.png --crop 120,80,60,40 --methods bicubic SMSR.pt hr --output strip.png

The image is of high resolution; its LR image is made as MATLAB's bicubic makes it. PSNR (dB) and SSIM are those of the
whole image, by the protocol of benchmark sets.

methods    bicubic, hr (the image itself), or a file of weights, of SMSR or of EDSR; all of one scale
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from data.image import read_image
from data.resize import crop_to_multiple, downscale, upscale
from evaluation import compare
from metrics import quantize
from model import load_model
from option import Parser, png, positive_int
from utility import InputError, run_program, write_whole


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="of high resolution")
    parser.add_argument("--crop", type=crop, required=True, metavar="X,Y,W,H", help="pixels of the image")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--scale", type=positive_int, help="where no method is a network")
    parser.add_argument("--output", type=png, required=True, metavar="FILE.png")
    return parser.parse_args(argv)


def crop(text):
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdigit() for number in numbers) or "0" in numbers[2:]:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 120,80,60,40: left, top, width and height")
    return tuple(map(int, numbers))


def main(argv=None):
    args = parse(argv)
    for method in args.methods:
        if method not in ("bicubic", "hr") and not Path(method).is_file():
            raise InputError(f"--methods {method}: is neither bicubic nor hr nor a file of weights")
    networks = {method: load_model(method) for method in args.methods if method not in ("bicubic", "hr")}
    scales = {model.scale for model in networks.values()} | ({args.scale} if args.scale else set())
    if len(scales) != 1:
        if not scales:
            raise InputError("--methods: none is a network; say with --scale how far to upscale")
        found = ", ".join(f"x{scale}" for scale in sorted(scales))
        raise InputError(f"--methods: are of {found}; all, and --scale, must be of one scale")
    (scale,) = scales
    hr = crop_to_multiple(read_image(args.image), scale)
    if not hr.size:
        raise InputError(f"--image {args.image}: is smaller than {scale} pixels")
    x, y, width, height = args.crop
    if x + width > hr.shape[1] or y + height > hr.shape[0]:
        raise InputError(f"--crop {x},{y},{width},{height}: reaches out of the image, {hr.shape[1]}x{hr.shape[0]}")
    lr = downscale(hr, scale)
    panels = []
    for method in args.methods:
        sr, title = hr, "HR"
        if method != "hr":
            sr = upscale(lr, scale) if method == "bicubic" else _run(networks[method], lr)
            measured = compare(sr, hr, scale)
            title = f"{_label(method)}\n{measured['psnr_y']:.2f} dB / {measured['ssim_y']:.4f}"
            print(title.replace("\n", ": "))
        panels.append((sr[y : y + height, x : x + width], title))
    write_whole(args.output, pictures.comparison(hr, args.crop, panels))
    print(f"written to {args.output}")


def _label(method):
    """The name of the run that weights lie in, or that of their file."""
    path = Path(method)
    return path.parent.parent.name if path.parent.name == "model" else path.stem


def _run(model, lr):
    x = torch.from_numpy(lr.copy()).permute(2, 0, 1)[None].float()
    return quantize(model.inference(x)[0][0], 255)


if __name__ == "__main__":
    run_program(main)
