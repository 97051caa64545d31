"""Compare the time of sparse inference with the same network without masks and with EDSR-baseline.

    python tools/benchmark.py --pre_train WEIGHTS --images DIR --json out.json --plot out.png
    python tools/benchmark.py --pre_train WEIGHTS --size 360x640 --batch 8 --device cuda --precision half

All networks run in one process on the same images and take turns, after a warm-up; times are medians in milliseconds.
The strongest baseline is the unmasked network: all pixels are important, all channels are dense, and no mask is
computed or applied. All run in eager PyTorch and channels-last memory.

    unmasked_ms         the unmasked network in its fastest form, without concatenations and in place where possible
    as_written_ms       the unmasked network as it is written, with concatenations
    sparse_ms           --inference sparse of main.py: every module is sparse
    auto_ms             --inference auto, by the fastest engine: native on a CPU, fused on a GPU, else plain
    edsr_ms             EDSR-baseline of the same scale
    speedup             unmasked_ms / auto_ms
    speedup_as_written  as_written_ms / auto_ms
    mac_ratio           multiply-adds of the unmasked network / multiply-adds that the masks require: the ideal speedup
    efficiency          speedup / mac_ratio
    max_abs_diff        largest difference from the masked dense computation, for pixels in 0...255
    peak_mib_unmasked   largest amount of memory a call needs in addition to weights and image
    peak_mib_sparse     the same for sparse inference; on a CPU both are measured on Linux only
If the native engine runs, these columns show what the masks save and what its kernels do:

    plain_ms                 --inference auto by plain operators
    unmasked_native_ms       the unmasked network by the kernels of the native engine
    speedup_unmasked_native  unmasked_native_ms / auto_ms: what the masks alone save

With --compile, unmasked_compiled_ms is the unmasked network after torch.compile. This takes a minute per image size.
"""

import argparse
import copy
import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure  # no pyplot: it may open a window system

from data.image import read_image
from model import build_model, load_model
from model.engines import pick_engine
from model.engines.native import NativeEngine, NativePlan
from model.network import Network
from model.smsr import SMSR
from model.sparse import Plan
from option import file_to_write, positive_int
from picture import image_files, name_images
from program import InputError, report_batch
from tools.benchmarks.baselines import Unmasked, with_density
from tools.benchmarks.timing import peak_mib, say, timed
from utility import PRECISIONS, pick_device, write_json
from visualize import COLORS

SAMPLE = Path(__file__).resolve().parents[2] / "testsets/benchmark/Sample"
PLOT_FORMATS = (".png", ".svg", ".pdf")
RATIOS = ("speedup", "speedup_as_written", "speedup_unmasked_native", "mac_ratio", "efficiency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("--batch", type=positive_int, default=1, help="number of copies of an image per call")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--precision", choices=PRECISIONS, default="single", help="floating-point type of all networks")
    parser.add_argument("--compile", action="store_true", help="also time the compiled unmasked network")
    parser.add_argument(
        "--plot",
        type=file_to_write(*PLOT_FORMATS),
        metavar="FILE.png",
        help="plot time against mask density, on the first image with shifted masks",
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks of inference share."""
    parser.add_argument("--pre_train", metavar="FILE", required=True, help="weights of an SMSR network")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, metavar="DIR", help="folder of LR images (default: the Sample set)")
    images.add_argument(
        "--size", type=parse_size, metavar="HxW", help="use one LR image of this size, a mirrored photograph"
    )
    parser.add_argument("--threads", type=positive_int, help="number of CPU threads (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=positive_int, default=11, help="number of timed calls per network")
    parser.add_argument("--json", type=file_to_write(".json"), metavar="FILE", help="write the results to this file")


def parse_size(text: str) -> tuple[int, int]:
    """'360x640' -> (360, 640), height and width."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 360x640 (height x width)")
    return int(match[1]), int(match[2])


def mirrored_photograph(height: int, width: int, n_colors: int = 3) -> np.ndarray:
    """A photograph of the Sample set, uint8 (height, width, n_colors), cropped or extended by mirroring."""
    image = read_image(SAMPLE / "HR/coffee.png", n_colors)
    missing = [(0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1])), (0, 0)]
    return np.pad(image, missing, mode="symmetric")[:height, :width]


def read_images(args: argparse.Namespace, n_colors: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """The LR images that the options ask for, {name: uint8 (H, W, n_colors)}, and why others cannot be read.

    Raises InputError if there are none.
    """
    if args.size:
        height, width = args.size
        return {f"{height}x{width}": mirrored_photograph(height, width, n_colors)}, []
    folder, images, failures = args.images or SAMPLE / "LR_bicubic/X2", {}, []
    for name, path in name_images(image_files(folder)).items():
        try:
            images[name] = read_image(path, n_colors)
        except InputError as error:
            failures.append(str(error))
    if not images:
        report_batch(failures, len(failures))
        raise InputError(f"--images {folder}: contains no images; choose a folder of LR images")
    return images, failures


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the files that the options ask for; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    model = load_model(args.pre_train, "SMSR").to(device, dtype, memory_format=torch.channels_last)
    try:
        edsr = build_model("EDSR", scale=model.scale, n_colors=model.n_colors).eval()
    except InputError as error:  # EDSR does not exist for every scale
        raise InputError(f"--pre_train {args.pre_train}: {error}") from None
    edsr = edsr.to(device, dtype, memory_format=torch.channels_last)
    found, failures = read_images(args, model.n_colors)
    batches = {name: model.to_input(np.repeat(image[None], args.batch, axis=0)) for name, image in found.items()}
    images = []
    for name, x in batches.items():
        say(f"timing {name}, {len(images) + 1} of {len(batches)}")
        images.append({"name": name, **measure(model, edsr, x, args.repeats, args.compile)})
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "images": images,
    }
    for column in ratio_columns(images):
        report[f"geomean_{column}"] = statistics.geometric_mean(image[column] for image in images)
    print("\n".join(table(report)))
    if args.json:
        write_json(args.json, report)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(args.plot, model, next(iter(batches.values())), args.repeats)
    return report_batch(failures, len(found) + len(failures))


@torch.inference_mode()
def measure(model: SMSR, edsr: Network, x: torch.Tensor, repeats: int, compiled: bool) -> dict[str, object]:
    """The results for images x (N, n_colors, H, W) in 0...rgb_range; see the top of this file for the keys."""
    _, cost = model.inference(x, "sparse")
    networks = {
        "unmasked_ms": Unmasked(model),
        "as_written_ms": model.unmasked_forward,
        "sparse_ms": functools.partial(model.inference, mode="sparse"),
        "auto_ms": functools.partial(model.inference, mode="auto"),
        "edsr_ms": edsr,
        **native_comparison(model),
    }
    if compiled:
        networks["unmasked_compiled_ms"] = torch.compile(Unmasked(model))
    calls = {name: functools.partial(network, x) for name, network in networks.items()}
    times = timed(calls, x.device, repeats)
    fresh = copy.deepcopy(model)
    fresh.inference(x[..., :2, :2], "sparse")  # builds the plan, with a workspace of almost no size
    return {
        "lr_shape": list(x.shape[2:]),
        "mask_density": cost.mask_density,
        **times,
        **ratios(times, cost.macs_dense / cost.macs),
        "max_abs_diff": largest_difference(model, x),
        "peak_mib_unmasked": peak_mib(calls["unmasked_ms"], x.device),
        "peak_mib_sparse": peak_mib(functools.partial(fresh.inference, x, "sparse"), x.device),
    }


def native_comparison(model: SMSR) -> dict[str, Callable[[torch.Tensor], object]]:
    """The networks that tell the gain by masks from the gain by native kernels, {column: network}; else none."""
    plan = Plan(model)
    if not isinstance(pick_engine(plan), NativeEngine):
        return {}
    return {"plain_ms": plan, "unmasked_native_ms": NativePlan(plan, masked=False)}


def ratios(times: dict[str, float], mac_ratio: float) -> dict[str, float]:
    """The values of RATIOS for the times of an image in milliseconds."""
    speedups = {
        "speedup": "unmasked_ms",
        "speedup_as_written": "as_written_ms",
        "speedup_unmasked_native": "unmasked_native_ms",
    }
    values = {name: times[column] / times["auto_ms"] for name, column in speedups.items() if column in times}
    return {**values, "mac_ratio": mac_ratio, "efficiency": values["speedup"] / mac_ratio}


def time_columns(images: list[dict[str, object]]) -> list[str]:
    return [column for column in images[0] if column.endswith("_ms")]


def ratio_columns(images: list[dict[str, object]]) -> list[str]:
    return [column for column in RATIOS if column in images[0]]


def largest_difference(model: SMSR, x: torch.Tensor) -> float:
    """Largest difference between skipping and masked dense computation, for pixels in 0...255."""
    expected = model.masked_forward(x)
    difference = max((model.inference(x, mode)[0] - expected).abs().max().item() for mode in ("sparse", "auto"))
    return difference * 255 / model.rgb_range.item()


def table(report: dict[str, object]) -> list[str]:
    """The lines that show a report: a header, one row per image, and the geometric means."""
    time_names, ratio_names = time_columns(report["images"]), ratio_columns(report["images"])
    widths = {column: max(9, len(column)) for column in (*time_names, *ratio_names)}
    name_width = max(10, *(len(image["name"]) for image in report["images"]))
    header = "".join(f" {column:>{width}}" for column, width in widths.items())
    lines = [f"{'LR image':{name_width}} {'size':>10} {'density':>8}{header}"]
    for image in report["images"]:
        size = "x".join(map(str, image["lr_shape"]))
        density = statistics.fmean(image["mask_density"])
        numbers = "".join(f" {image[column]:{widths[column]}.1f}" for column in time_names)
        numbers += "".join(f" {image[column]:{widths[column]}.2f}" for column in ratio_names)
        lines.append(f"{image['name']:{name_width}} {size:>10} {density:8.2f}{numbers}")
    means = "".join(f" {report[f'geomean_{column}']:{widths[column]}.2f}" for column in ratio_names)
    lines.append("geometric mean".ljust(len(lines[0]) - len(means)) + means)
    return lines


@torch.inference_mode()
def plot(path: Path, model: SMSR, x: torch.Tensor, repeats: int) -> None:
    """Write a figure of time against mask density, for images x (N, n_colors, H, W) in 0...rgb_range."""
    densities = [step / 10 for step in range(11)]
    times = []
    for density in densities:
        say(f"timing mask density {density}")
        shifted = with_density(model, x, density)
        calls = {mode: functools.partial(shifted.inference, x, mode) for mode in ("sparse", "auto")}
        times.append(timed({"unmasked": functools.partial(Unmasked(shifted), x), **calls}, x.device, repeats))
    times = [{mode: time / len(x) for mode, time in row.items()} for row in times]
    unmasked = statistics.median(row["unmasked"] for row in times)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(unmasked, color="black", label="unmasked network")
    for mode, style, color in (("sparse", "o-", COLORS[1]), ("auto", "s--", COLORS[2])):
        # Relative to the unmasked network at the same density, which cancels changes in the speed of the machine.
        relative = [row[mode] / row["unmasked"] * unmasked for row in times]
        label = f"--inference {mode}"
        axes.plot(densities, relative, style, color=color, label=label, clip_on=False)
    height, width = x.shape[2:]
    axes.set(xlabel="mask density", ylabel=f"time per image (ms), {width}x{height}", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
