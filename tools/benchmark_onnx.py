"""Time the exported networks in ONNX Runtime against PyTorch, on the CPU: sparse and dense, in both.

    python tools/benchmark.py onnx --pre_train WEIGHTS --images DIR --json out.json

All four give the same image and run in turns in one process; times are medians. The dense ones multiply what the masks
deny by zero (--mode dense of tools/export_onnx.py, --inference dense of main.py).

    speedup    ONNX dense / ONNX sparse
    of_native  PyTorch sparse / ONNX sparse: 1 where both are as quick
"""

import argparse
import functools
import statistics

import torch
from tqdm import tqdm

from model import load_model
from model.portable import MODES
from option import Parser
from tools.benchmark import CHANNELS_LAST, add_common, read_images, timed
from tools.export_onnx import export
from utility import InputError, write_json

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

COLUMNS = ("onnx_sparse", "onnx_dense", "native_sparse", "native_dense")


def parse(argv):
    parser = Parser(prog="benchmark.py onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    return parser.parse_args(argv)


def measure(args):
    """The report, a dict as it is written. Raises InputError without onnxruntime."""
    if onnxruntime is None:
        raise InputError("onnxruntime is not installed; pip install -r requirements-deploy.txt")
    model = load_model(args.pre_train, "SMSR").to(memory_format=CHANNELS_LAST)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads wait on PyTorch's time
    sessions = {}
    for mode in MODES:
        graph = export(model, mode, "float").SerializeToString()
        sessions[mode] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    images = []
    for name, x in tqdm(read_images(args, model.mean.shape[1]).items(), desc="images", leave=False):
        x = x.to(memory_format=CHANNELS_LAST)
        fed = {"image": x.permute(0, 2, 3, 1).contiguous().numpy()}
        runs = {f"onnx_{mode}": functools.partial(sessions[mode].run, ["sr"], fed) for mode in MODES}
        runs |= {f"native_{mode}": functools.partial(model.inference, x, mode) for mode in MODES}
        times = timed(runs, x.device, args.repeats)
        row = {"name": name, "lr_shape": list(x.shape[2:])} | {f"{key}_ms": times[key] for key in COLUMNS}
        row["speedup"] = times["onnx_dense"] / times["onnx_sparse"]
        row["of_native"] = times["native_sparse"] / times["onnx_sparse"]
        images.append(row)
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    report["images"] = images
    for key in ("speedup", "of_native"):
        report[f"geomean_{key}"] = statistics.geometric_mean(row[key] for row in images)
    return report


def main(argv):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = measure(args)
    width = max(14, *(len(row["name"]) for row in report["images"]))
    print(f"{'LR image':{width}}" + "".join(f" {key:>14}" for key in (*COLUMNS, "speedup", "of_native")))
    for row in report["images"]:
        times = "".join(f" {row[f'{key}_ms']:14.1f}" for key in COLUMNS)
        print(f"{row['name']:{width}}{times} {row['speedup']:14.2f} {row['of_native']:14.2f}")
    blank = " " * 15 * len(COLUMNS)
    print(f"{'geometric mean':{width}}{blank} {report['geomean_speedup']:14.2f} {report['geomean_of_native']:14.2f}")
    if args.json:
        write_json(args.json, report)
