"""Time sparse inference against the same network run dense, and against EDSR-baseline.

    python tools/benchmark.py --pre_train WEIGHTS --images DIR --json out.json --plot out.png
    python tools/benchmark.py --pre_train WEIGHTS --size 360x640 --batch 8 --device cuda --precision half
    python tools/benchmark.py train --help      the steps of a training
    python tools/benchmark.py data --help       the reading of training patches
    python tools/benchmark.py onnx --help       exported networks in ONNX Runtime

All run in one process on the same images and in turns, after a warm-up; times are medians. The dense network is the
hardest opponent: all its pixels are important and all its channels dense, no mask is computed or applied, and no
features are joined only to be multiplied.

    dense       that network, as eager PyTorch in channels-last memory
    plain       the same without our rewriting: as it is written, with concatenations
    sparse      --inference sparse of main.py: packed in every module
    auto        --inference auto: packed or dense, module by module
    edsr        EDSR-baseline, of the same scale
    speedup     dense / auto; speedup_plain: plain / auto
    mac_ratio   multiply-adds of the dense network over those that the masks ask for: what would be possible
    efficiency  speedup / mac_ratio
    max_abs_diff  largest difference to the masked dense computation, of pixels in 0...255
    peak_mib    most memory that a call needs beyond weights and image; on a CPU only where Linux tells
"""

import argparse
import copy
import ctypes
import functools
import gc
import importlib
import re
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.image import list_images, read_image
from model import build_model, load_model
from model.common import pad_to_multiple
from model.smsr import IMPORTANT, SPARSE
from option import PRECISIONS, Parser, positive_int
from utility import InputError, pick_device, run_program, seconds_of, write_json

SAMPLE = Path(__file__).resolve().parent.parent / "testsets/benchmark/Sample"
CHANNELS_LAST = torch.channels_last
MEANS = ("speedup", "speedup_plain", "mac_ratio", "efficiency")  # of which geometric means over the images are told


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--batch", type=positive_int, default=1, help="so many copies of an image at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", choices=PRECISIONS, default="single", help="numbers of all networks")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot time against mask density, shifted on the first image"
    )
    return parser.parse_args(argv)


def add_common(parser):
    """The options that benchmarks of inference share."""
    parser.add_argument("--pre_train", required=True, help="weights of an SMSR")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, metavar="DIR", help="LR images (default: those of the Sample set)")
    images.add_argument("--size", type=size, metavar="HxW", help="one LR image of this size, a mirrored photograph")
    parser.add_argument("--threads", type=positive_int, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=positive_int, default=11, help="timed runs of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def size(text):
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 360x640, height x width")
    return int(match[1]), int(match[2])


class Plain(torch.nn.Module):
    """The network of a trained SMSR with nothing masked, as it is written. Images in and out as for `Dense`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        model, (height, width) = self.model, x.shape[2:]
        x = pad_to_multiple(x - model.mean, 2)
        head = f = model.head(x)
        modules = []
        for block in model.blocks:
            g, layers = f, []
            for conv in block.convs:
                g = F.relu(conv(g))
                layers.append(g)
            f = f + block.attention(block.collect(torch.cat(layers, 1)))
            modules.append(f)
        f = head + model.collect(torch.cat(modules, 1))
        return model.reconstruct(f, x)[..., : height * model.scale, : width * model.scale]


class Dense(torch.nn.Module):
    """The network of a trained SMSR with nothing masked, the fastest way that eager PyTorch knows.

    The 1x1 convolutions of what would be concatenated are added up, and what can be is done in place. Images
    (N, n_colors, H, W) in 0...rgb_range -> (N, n_colors, scale H, scale W).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.collect = self._split(model.collect[0], len(model.blocks))
        self.block_collects = [self._split(block.collect, len(block.convs)) for block in model.blocks]

    @staticmethod
    def _split(conv, count):
        return [weight.contiguous(memory_format=CHANNELS_LAST) for weight in conv.weight.detach().chunk(count, 1)]

    def forward(self, x):
        model, (height, width) = self.model, x.shape[2:]
        x = pad_to_multiple(x - model.mean, 2)
        head = f = model.head(x)
        total = None
        for block, weights, collect in zip(model.blocks, self.block_collects, self.collect, strict=True):
            g, y = f, None
            for conv, weight in zip(block.convs, weights, strict=True):
                g = F.relu_(conv(g))
                y = F.conv2d(g, weight, block.collect.bias) if y is None else y.add_(F.conv2d(g, weight))
            f = torch.addcmul(f, y, block.attention.weights(y.mean((2, 3), keepdim=True)))
            product = F.conv2d(f, collect, model.collect[0].bias if total is None else None)
            total = product if total is None else total.add_(product)
        f = model.collect[2](total.relu_()).add_(head)
        return model.tail(f).add_(model.upsample(x))[..., : height * model.scale, : width * model.scale]


@torch.no_grad()
def with_density(model, x, density):
    """A copy of the network in whose every mask this share of the pixels of x (N, n_colors, H, W) is important."""
    model = copy.deepcopy(model)
    f = model.head(pad_to_multiple(x - model.mean, 2))
    for block in model.blocks:
        logits = block.spatial_mask(f)
        margin = (logits[:, IMPORTANT] - logits[:, SPARSE]).flatten().float().sort(descending=True).values
        count = round(density * len(margin))
        least = torch.cat([margin[:1] + 1, margin, margin[-1:] - 1])[count : count + 2].mean()
        block.spatial_mask[-1].bias[IMPORTANT] -= least.to(f.dtype)
        f = block(f, *block.hard_masks(f))
    return model


def timed(runs, device, repeats):
    """Median milliseconds of each of the functions in `runs`, called in turns."""
    for run in runs.values():
        run()
        run()
    times = {name: [] for name in runs}
    for repeat in range(repeats):
        names = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        for name in names:
            times[name].append(seconds_of(runs[name], device))
    return {name: float(np.median(values)) * 1e3 for name, values in times.items()}


def peak_mib(run, device):
    """The most memory that run() needs at a time, in MiB; None where nobody tells."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before would not be seen when used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    except (OSError, AttributeError, TypeError):
        return None
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 2**10


def _status(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@torch.inference_mode()
def measure(model, edsr, x, repeats):
    """The numbers of the images x, without their name."""
    _, work = model.inference(x, "sparse")
    exact = model.masked_forward(x)
    difference = max((model.inference(x, mode)[0] - exact).abs().max().item() for mode in ("sparse", "auto"))
    runs = {
        "dense": functools.partial(Dense(model), x),
        "plain": functools.partial(Plain(model), x),
        "sparse": functools.partial(model.inference, x, "sparse"),
        "auto": functools.partial(model.inference, x, "auto"),
        "edsr": functools.partial(edsr, x),
    }
    times = timed(runs, x.device, repeats)
    ratio, speedup = work.macs_dense / work.macs, times["dense"] / times["auto"]
    fresh = copy.deepcopy(model)
    fresh.inference(x[..., :2, :2], "sparse")  # a plan, and workspaces next to empty
    return {
        "lr_shape": list(x.shape[2:]),
        "mask_density": work.mask_density,
        **{f"{name}_ms": value for name, value in times.items()},
        "speedup": speedup,
        "speedup_plain": times["plain"] / times["auto"],
        "mac_ratio": ratio,
        "efficiency": speedup / ratio,
        "max_abs_diff": difference,
        "peak_mib_dense": peak_mib(runs["dense"], x.device),
        "peak_mib_sparse": peak_mib(functools.partial(fresh.inference, x, "sparse"), x.device),
    }


def table(report):
    """The lines of a report."""
    numbers = ("dense_ms", "plain_ms", "sparse_ms", "auto_ms", "edsr_ms", *MEANS)
    width = max(10, *(len(image["name"]) for image in report["images"]))
    lines = [f"{'LR image':{width}} {'size':>10} {'density':>8}" + "".join(f" {column:>13}" for column in numbers)]
    for image in report["images"]:
        height, breadth = image["lr_shape"]
        density = sum(image["mask_density"]) / len(image["mask_density"])
        row = "".join(f" {image[column]:13.{1 if column.endswith('ms') else 2}f}" for column in numbers)
        lines.append(f"{image['name']:{width}} {f'{height}x{breadth}':>10} {density:8.2f}" + row)
    means = "".join(f" {report[f'geomean_{column}']:13.2f}" for column in MEANS)
    lines.append("geometric mean".ljust(len(lines[0]) - len(means)) + means)
    return lines


@torch.inference_mode()
def plot(path, model, x, repeats):
    """Write a figure of time against mask density."""
    densities = [step / 10 for step in range(11)]
    times = []
    for density in tqdm(densities, desc="densities", leave=False):
        shifted = with_density(model, x, density)
        runs = {"dense": functools.partial(Dense(shifted), x)}
        runs |= {mode: functools.partial(shifted.inference, x, mode) for mode in ("sparse", "auto")}
        times.append(timed(runs, x.device, repeats))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    dense = np.median([row["dense"] for row in times])
    axes.axhline(dense, color="black", label="dense network, no masks")
    for mode, style in (("sparse", "o-"), ("auto", "s--")):
        steady = [row[mode] / row["dense"] * dense for row in times]  # as if the machine were as quick at each density
        axes.plot(densities, steady, style, label=f"--inference {mode}")
    height, width = x.shape[2:]
    axes.set(xlabel="mask density", ylabel=f"ms for {len(x)} x {height}x{width}", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_images(args, n_colors):
    """{name: LR image (1, n_colors, H, W) in 0...255}"""
    if args.size:
        image = read_image(SAMPLE / "HR/coffee.png", n_colors)
        height, width = args.size
        pad = [(0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1])), (0, 0)]
        images = {f"{height}x{width}": np.pad(image, pad, mode="symmetric")[:height, :width]}
    else:
        folder = args.images or SAMPLE / "LR_bicubic/X2"
        images = {name: read_image(path, n_colors) for name, path in list_images(folder).items()}
        if not images:
            raise InputError(f"--images {folder}: no images there")
    return {name: torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() for name, image in images.items()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["train"], ["data"], ["onnx"]):
        return importlib.import_module(f"tools.benchmark_{argv[0]}").main(argv[1:])
    args = parse(argv)
    if args.plot and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {args.plot}: is not a .png, .svg or .pdf file")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    model = load_model(args.pre_train, "SMSR").to(device, dtype, memory_format=CHANNELS_LAST)
    n_colors = model.mean.shape[1]
    edsr = build_model("EDSR", scale=model.scale, n_colors=n_colors).eval()
    edsr = edsr.to(device, dtype, memory_format=CHANNELS_LAST)
    batches = {
        name: image.repeat(args.batch, 1, 1, 1).to(device, dtype, memory_format=CHANNELS_LAST)
        for name, image in read_images(args, n_colors).items()
    }
    images = [
        {"name": name} | measure(model, edsr, x, args.repeats)
        for name, x in tqdm(batches.items(), desc="images", leave=False)
    ]
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "images": images,
    }
    for column in MEANS:
        report[f"geomean_{column}"] = statistics.geometric_mean(image[column] for image in images)
    print("\n".join(table(report)))
    if args.json:
        write_json(args.json, report)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(args.plot, model, next(iter(batches.values())), args.repeats)


if __name__ == "__main__":
    run_program(main)
