"""Export a network as one ONNX file, which skips the masked work wherever ONNX Runtime runs.

    python tools/export_onnx.py --pre_train experiment/SMSR_X2/model/model_best.pt --output smsr_x2.onnx

Needs pip install -r requirements-deploy.txt. The graph takes `image`, (N, H, W, 3) in 0...255 of any height and width,
and gives `sr`, (N, scale H, scale W, 3) and, with --masks, `masks`, uint8 (N, K, H, W), 1 where a pixel is important.
N is 1 in a sparse graph and free in a dense one. The network is one that was trained with --rgb_range 255.

Operators are those of ONNX's standard set, opset 18. Metadata: smsr_scale, smsr_model, smsr_n_feats, smsr_mode,
smsr_pixels, smsr_precision, smsr_version, smsr_weights_sha256.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load_model
from model.edsr import EDSR
from model.portable import MODES, PIXELS, ROWS, build_portable
from option import PRECISIONS, Parser
from utility import InputError, run_program, write_whole

OPSET = 18


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pre_train", type=Path, required=True, help="weights of an SMSR, or of an EDSR")
    parser.add_argument("--output", type=onnx_file, required=True, metavar="FILE.onnx")
    parser.add_argument("--mode", choices=MODES, help="default: sparse; of an EDSR dense")
    parser.add_argument("--precision", choices=("single", "half"), default="single", help="of weights and features")
    parser.add_argument("--pixels", choices=PIXELS, default="uint8", help="numbers of images, in and out")
    parser.add_argument("--res_scale", type=float, help="of an EDSR, as in its training (default: 1)")
    parser.add_argument("--masks", action="store_true", help="the masks as a second output")
    return parser.parse_args(argv)


def onnx_file(text):
    if not text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of an .onnx file")
    return Path(text)


def export(model, mode="sparse", pixels="uint8", masks=False):
    """The network (of the package `model`, in eval mode) as an onnx.ModelProto. Raises InputError without onnx."""
    try:
        import onnx
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError:
        raise InputError("onnx is not installed; pip install -r requirements-deploy.txt") from None
    portable = build_portable(model, mode, pixels)
    has_masks = not isinstance(model, EDSR)
    outputs = ["sr", "masks"] if has_masks else ["sr"]
    dtype = torch.uint8 if pixels == "uint8" else model.mean.dtype
    free = torch.export.Dim.DYNAMIC
    sizes = {1: free, 2: free} | ({0: free} if mode == "dense" else {})
    example = torch.zeros(2 if mode == "dense" else 1, 18, 22, model.mean.shape[1], dtype=dtype)
    with _silence():
        program = torch.onnx.export(
            portable, (example,), dynamo=True, opset_version=OPSET, input_names=["image"], output_names=outputs,
            dynamic_shapes=(sizes,), verbose=False,
        )  # fmt: skip
    graph = program.model_proto
    if mode == "sparse":
        _in_parts(graph.graph)
    if has_masks and not masks:
        del graph.graph.output[1]
    _name_sizes(graph, model.scale)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _in_parts(graph):
    """Have rows of neighbours gathered and multiplied at most ROWS at a time, so that they stay in the cache.

    PyTorch 2.13 exports no loop whose length is known at run time alone. So Gather, Reshape, MatMul, Relu, wherever
    they follow each other, become the body of a Scan.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    numbers = {"parts_longest": 9 * ROWS, "parts_round_up": 9 * ROWS - 1, "parts_rest": -1}
    graph.initializer.extend(numpy_helper.from_array(np.array([value]), key) for key, value in numbers.items())
    divided = set()  # indices of which there are parts
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        reshape = makers.get(node.input[0])
        gather = makers.get(reshape.input[0]) if reshape is not None and reshape.op_type == "Reshape" else None
        if gather is None or gather.op_type != "Gather":
            continue
        (relu,) = readers[node.output[0]]
        name, weight = relu.output[0], weights[node.input[1]]  # (9 C, C)
        body = helper.make_graph(
            [
                helper.make_node("Gather", [gather.input[0], f"{name}_around"], [f"{name}_gathered"], axis=0),
                helper.make_node("Reshape", [f"{name}_gathered", reshape.input[1]], [f"{name}_rows"]),
                helper.make_node("MatMul", [f"{name}_rows", node.input[1]], [f"{name}_product"]),
                helper.make_node("Relu", [f"{name}_product"], [f"{name}_part"]),
            ],
            f"{name}_body",
            [helper.make_tensor_value_info(f"{name}_around", TensorProto.INT64, [None])],
            [helper.make_tensor_value_info(f"{name}_part", weight.data_type, [None, weight.dims[1]])],
        )
        indices, new = gather.input[1], []
        if indices not in divided:
            divided.add(indices)
            new = [
                helper.make_node("Shape", [indices], [f"{indices}_size"]),
                helper.make_node("Add", [f"{indices}_size", "parts_round_up"], [f"{indices}_rounded"]),
                helper.make_node("Div", [f"{indices}_rounded", "parts_longest"], [f"{indices}_count"]),
                helper.make_node("Concat", [f"{indices}_count", "parts_rest"], [f"{indices}_shape"], axis=0),
                helper.make_node("Reshape", [indices, f"{indices}_shape"], [f"{indices}_parts"]),
            ]
        new += [
            helper.make_node("Scan", [f"{indices}_parts"], [f"{name}_stacked"], body=body, num_scan_inputs=1),
            helper.make_node("Reshape", [f"{name}_stacked", f"{name}_flat"], [name]),
        ]
        graph.initializer.append(numpy_helper.from_array(np.array([-1, weight.dims[1]]), f"{name}_flat"))
        place = list(graph.node).index(relu)
        for old in (gather, reshape, node, relu):
            graph.node.remove(old)
        for index, added in enumerate(new):
            graph.node.insert(place - 3 + index, added)


def _name_sizes(graph, scale):
    """Names in place of the exporter's expressions, which differ from version to version."""
    names = {"image": ("N", "H", "W"), "sr": ("N", f"{scale}*H", f"{scale}*W"), "masks": ("N", None, "H", "W")}
    for value in (*graph.graph.input, *graph.graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=False):
            if name and not size.HasField("dim_value"):
                size.dim_param = name


@contextlib.contextmanager
def _silence():
    """The exporter tells of its own deprecations, through warnings, logs and prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main(argv=None):
    args = parse(argv)
    model = load_model(args.pre_train, res_scale=args.res_scale)
    dense = isinstance(model, EDSR)
    if dense and args.mode == "sparse":
        raise InputError(f"--mode sparse: {args.pre_train} is of EDSR, which has nothing to skip; take --mode dense")
    mode = args.mode or ("dense" if dense else "sparse")
    if args.masks and dense:
        raise InputError(f"--masks: {args.pre_train} is of EDSR, which has none; leave it out")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # before a minute of work
    except OSError as error:
        raise InputError(f"--output {args.output}: its folder cannot be made: {error.strerror}") from None
    graph = export(model.to(PRECISIONS[args.precision]), mode, args.pixels, args.masks)
    facts = {
        "scale": model.scale,
        "model": type(model).__name__,
        "n_feats": model.head[-1].out_channels,
        "mode": mode,
        "pixels": args.pixels,
        "precision": args.precision,
        "version": version(),
        "weights_sha256": hashlib.sha256(args.pre_train.read_bytes()).hexdigest(),
    }
    for key, value in facts.items():
        graph.metadata_props.add(key=f"smsr_{key}", value=str(value))
    content = graph.SerializeToString()
    write_whole(args.output, content)
    print(
        f"{args.output}: {type(model).__name__} x{model.scale}, {mode}, {len(content) / 2**20:.1f} MiB, opset {OPSET}"
    )


def version():
    """Of this project."""
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.*)"', project, re.MULTILINE)[1]


if __name__ == "__main__":
    run_program(main)
