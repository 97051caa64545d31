"""Compare the time of exported networks in ONNX Runtime with PyTorch on the CPU, sparse and masked dense.

    python tools/benchmark.py onnx --pre_train WEIGHTS --images DIR --json out.json

All four calls return the same image. They run in one process and take turns; times are medians in milliseconds.
"dense" is the masked dense computation: --mode dense of tools/export_onnx.py and --inference dense of main.py compute
everything and then apply the masks.

    onnx_sparse, onnx_dense      the exported graphs in ONNX Runtime
    native_sparse, native_dense  the network in PyTorch
    speedup                      onnx_dense / onnx_sparse
    of_native                    native_sparse / onnx_sparse: above 1 if ONNX Runtime is faster than PyTorch
"""

import argparse
import functools
import statistics

import numpy as np
import torch

from model import load_model
from model.onnx import GRAPH_MODES, export
from model.smsr import SMSR
from program import InputError, report_batch
from tools.benchmarks.inference import add_image_arguments, read_images
from tools.benchmarks.timing import say, timed
from utility import write_json

COLUMNS = ("onnx_sparse", "onnx_dense", "native_sparse", "native_dense")
RATIOS = ("speedup", "of_native")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the results where --json asks for it; returns the exit code.

    Raises InputError without onnxruntime.
    """
    try:
        import onnxruntime  # an optional package
    except ImportError:
        raise InputError("onnxruntime is not installed; pip install -r requirements-deploy.txt") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.pre_train, "SMSR").to(memory_format=torch.channels_last)
    (found, failures), images = read_images(args, model.n_colors), []
    say("exporting the network, which takes a minute")
    sessions = build_sessions(model)
    for name, image in found.items():
        say(f"timing {name}, {len(images) + 1} of {len(found)}")
        images.append({"name": name, **measure(model, sessions, image, args.repeats)})
    report = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "images": images,
    }
    for key in RATIOS:
        report[f"geomean_{key}"] = statistics.geometric_mean(row[key] for row in images)
    print("\n".join(table(report)))
    if args.json:
        write_json(args.json, report)
    return report_batch(failures, len(found) + len(failures))


def build_sessions(model: SMSR) -> dict[str, object]:
    """{mode of the graph: onnxruntime.InferenceSession}, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # By default, waiting threads of a session would keep the cores busy while PyTorch is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = {}
    for mode in GRAPH_MODES:
        graph = export(model, mode, "float").SerializeToString()
        sessions[mode] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return sessions


def measure(model: SMSR, sessions: dict[str, object], image: np.ndarray, repeats: int) -> dict[str, object]:
    """The results for an image, uint8 (H, W, n_colors); see the top of this file for the keys."""
    x = model.to_input(image[None])
    inputs = {"image": image[None].astype(np.float32)}
    calls = {f"onnx_{mode}": functools.partial(sessions[mode].run, ["sr"], inputs) for mode in GRAPH_MODES}
    calls |= {f"native_{mode}": functools.partial(model.inference, x, mode) for mode in GRAPH_MODES}
    times = timed(calls, x.device, repeats)
    return {
        "lr_shape": list(x.shape[2:]),
        **{f"{column}_ms": times[column] for column in COLUMNS},
        "speedup": times["onnx_dense"] / times["onnx_sparse"],
        "of_native": times["native_sparse"] / times["onnx_sparse"],
    }


def table(report: dict[str, object]) -> list[str]:
    """The lines that show a report: a header, one row per image, and the geometric means."""
    width = max(14, *(len(row["name"]) for row in report["images"]))
    lines = [f"{'LR image':{width}}" + "".join(f" {key:>14}" for key in (*COLUMNS, *RATIOS))]
    for row in report["images"]:
        times = "".join(f" {row[f'{column}_ms']:14.1f}" for column in COLUMNS)
        lines.append(f"{row['name']:{width}}{times}" + "".join(f" {row[key]:14.2f}" for key in RATIOS))
    blank = " " * 15 * len(COLUMNS)
    means = "".join(f" {report[f'geomean_{key}']:14.2f}" for key in RATIOS)
    lines.append(f"{'geometric mean':{width}}{blank}{means}")
    return lines
